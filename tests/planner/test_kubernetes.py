"""The apply path, against a server that speaks the scale subresource and holds its client to the chart's Role."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry import errors
from kvferry._roles import CertificateRole
from kvferry.types import WorkerRole
from services.planner.kubernetes import ApiServer, KubernetesReplicas
from services.planner.pacing import Bounds
from services.planner.replicas import Replicas
from tests.certificates import make_authority
from tests.chart.helm import NoHelmError, find_helm, render
from tests.chart.workloads import of_kind
from tests.planner.api_server import Api, serving

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
GROUPS = {PREFILL: "prod-kvferry-prefill", DECODE: "prod-kvferry-decode"}
RULES = [
    {"apiGroups": ["apps"], "resources": ["statefulsets/scale"], "resourceNames": [*GROUPS.values()],
     "verbs": ["get", "patch"]}
]  # fmt: skip
SETS = {("serving", name): [2, 2] for name in GROUPS.values()}
BOUNDS = Bounds(minimum=1, maximum=6, most_up=8, most_down=1)


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """As Kubernetes mounts it, and the server's own certificate beside."""
    make_authority(tmp_path)
    (tmp_path / "ca.crt").write_bytes((tmp_path / "ca.pem").read_bytes())
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("serving")
    return tmp_path


@pytest.fixture
def api(account: Path) -> Iterator[Api]:
    role = CertificateRole.GATEWAY.value
    sets = {key: list(value) for key, value in SETS.items()}
    with serving(Api("first", RULES, sets), account / f"{role}.pem", account / f"{role}.key") as served:
        yield served


def replicas(api: Api, account: Path, *, timeout_s: float = 10.0, namespace: str = "") -> KubernetesReplicas:
    server = ApiServer(f"https://localhost:{api.port}", account, timeout_s)
    return KubernetesReplicas(GROUPS, bounds=BOUNDS, api=server, namespace=namespace)


async def test_a_role_is_scaled(api: Api, account: Path) -> None:
    scaled: Replicas = replicas(api, account)
    decode = api.sets[("serving", GROUPS[DECODE])]
    assert await scaled.count(DECODE) == 2
    await scaled.scale(DECODE, 5)
    assert await scaled.count(DECODE) == 5
    assert await scaled.count(PREFILL) == 2
    decode[1] = 5
    await scaled.scale(DECODE, 3)
    assert decode == [4, 5]
    await scaled.scale(DECODE, 3)  # one still drains
    assert decode == [4, 5]
    decode[1] = 4
    await scaled.scale(DECODE, 3)
    assert decode == [3, 4]
    decode[1] = 3
    api.calls.clear()
    await scaled.scale(DECODE, 3)  # nothing is to be done, and nothing is written
    path = f"/apis/apps/v1/namespaces/serving/statefulsets/{GROUPS[DECODE]}/scale"
    assert api.calls == [("GET", path)]


async def test_a_group_of_none(api: Api, account: Path) -> None:
    api.sets[("serving", GROUPS[PREFILL])][:] = [0, 0]
    scaled = replicas(api, account)
    assert await scaled.count(PREFILL) == 0
    await scaled.scale(PREFILL, 0)
    assert await scaled.count(PREFILL) == BOUNDS.minimum


async def test_a_token_that_is_replaced_is_used(api: Api, account: Path) -> None:
    scaled = replicas(api, account)
    await scaled.count(DECODE)
    api.token = "second"
    with pytest.raises(errors.UnauthenticatedError, match="401"):
        await scaled.count(DECODE)
    (account / "token").write_text("second\n")
    assert await scaled.count(DECODE) == 2


async def test_refusals_say_what_to_do(api: Api, account: Path) -> None:
    with pytest.raises(errors.NotFoundError, match=r"404 statefulsets.apps .*; name a StatefulSet of the release"):
        await replicas(api, account, namespace="elsewhere").scale(DECODE, 3)
    one = KubernetesReplicas({DECODE: "x"}, bounds=BOUNDS, api=ApiServer(f"https://localhost:{api.port}", account))
    with pytest.raises(errors.NotFoundError, match="no StatefulSet is named for prefill workers"):
        await one.count(PREFILL)
    api.rules = [{**RULES[0], "verbs": ["get"]}]
    with pytest.raises(
        errors.PermissionDeniedError, match=r"PATCH .*/scale: 403 .* is forbidden; install the chart with"
    ):
        await replicas(api, account).scale(DECODE, 3)
    (account / "token").unlink()
    with pytest.raises(errors.UnavailableError, match="mount the token of a service account"):
        await replicas(api, account).count(DECODE)


async def test_a_server_that_is_slow_gone_or_another_ends_the_call(
    api: Api, account: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    api.delay_s = 1.0
    with pytest.raises(errors.DeadlineError, match=r"did not answer within 0.2 s"):
        await replicas(api, account, timeout_s=0.2).count(DECODE)
    api.delay_s = 0.0
    other = make_authority(tmp_path_factory.mktemp("other"))
    (account / "ca.crt").write_bytes((other / "ca.pem").read_bytes())
    calls = len(api.calls)
    with pytest.raises(errors.UnavailableError, match="certificate verify failed"):
        await replicas(api, account).count(DECODE)
    assert len(api.calls) == calls  # it never saw the token
    with pytest.raises(errors.InvalidRequestError, match="write https"):
        await KubernetesReplicas(GROUPS, bounds=BOUNDS, api=ApiServer("http://localhost:1", account)).count(DECODE)
    api.port = 1
    with pytest.raises(errors.UnavailableError, match="cannot be asked") as gone:
        await replicas(api, account).count(DECODE)
    assert gone.value.retry_after_s


async def test_the_charts_role_is_enough_and_no_more(api: Api, account: Path) -> None:
    try:
        manifests = render(find_helm(), ("secrets",))
    except NoHelmError as error:
        pytest.skip(str(error))
    (role,) = of_kind(manifests, "Role")
    api.rules = role["rules"]
    await replicas(api, account).scale(PREFILL, 3)
    assert await replicas(api, account).count(PREFILL) == 3
    headers = {"Authorization": "Bearer first", "Content-Type": "application/merge-patch+json"}
    whole = f"/apis/apps/v1/namespaces/serving/statefulsets/{GROUPS[PREFILL]}"
    directory = "/apis/apps/v1/namespaces/serving/statefulsets/prod-kvferry-directory/scale"
    for method, path in (("GET", whole), ("PATCH", whole), ("GET", directory), ("PATCH", directory)):
        assert api.answer(method, path, headers, b'{"spec": {"replicas": 0}}')[0] == 403
