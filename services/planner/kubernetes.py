"""Groups of workers in Kubernetes, scaled through its API: one subresource of StatefulSets, and nothing else is asked for.

docker/chart makes the account for it (``scaler.enabled``).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import structlog

from kvferry import errors
from kvferry.types import WorkerRole
from services.planner.pacing import Bounds, Size, next_step

_log = structlog.stdlib.get_logger(__name__)

IN_CLUSTER = "https://kubernetes.default.svc"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MAX_NBYTES = 1 << 20
_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class ApiServer:
    """``account``: a folder with the files token, ca.crt and namespace, as Kubernetes mounts it.  The token is read for
    each call: it is replaced while it is in use."""

    address: str = IN_CLUSTER
    account: Path = ACCOUNT
    timeout_s: float = 10.0

    def call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """Blocks, for ``timeout_s`` in each operation of the socket.  Raises kvferry.Error."""
        where = urlsplit(self.address)
        if where.scheme != "https" or not where.hostname:
            raise errors.InvalidRequestError(f"{self.address} is no address of an API server; write https://host:port")
        try:
            token = (self.account / "token").read_text(encoding="ascii").strip()
            context = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
        except (OSError, ValueError) as error:
            raise errors.UnavailableError(
                f"{self.account} has no usable token and ca.crt ({error}): mount the token of a service account"
            ) from error
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json"
        connection = http.client.HTTPSConnection(where.hostname, where.port, timeout=self.timeout_s, context=context)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read(_MAX_NBYTES)
        except TimeoutError as error:
            raise errors.DeadlineError(f"{self.address} did not answer within {self.timeout_s} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise errors.UnavailableError(
                f"{self.address} cannot be asked: {error}", retry_after_s=_RETRY_AFTER_S
            ) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise _refusal(response.status, content, f"{method} {path}")
        answer = _parsed(content)
        if answer is None:
            raise errors.InternalError(f"{self.address} answered {method} {path} with something that is no object")
        return answer

    def namespace(self) -> str:
        """The account's own.  Raises kvferry.Error."""
        try:
            return (self.account / "namespace").read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise errors.UnavailableError(f"{self.account / 'namespace'} cannot be read: {error}") from error


class KubernetesReplicas:
    """Replicas (see there) of one StatefulSet for each role.  Of a group that shrinks, pods with the highest numbers get
    SIGTERM, and drain within their grace period; no others go before they have ended."""

    def __init__(
        self, groups: Mapping[WorkerRole, str], *, bounds: Bounds, api: ApiServer | None = None, namespace: str = ""
    ) -> None:
        """``groups``: StatefulSets by name, in ``namespace`` or the account's own.  Raises kvferry.Error."""
        self._api = ApiServer() if api is None else api
        self._bounds = bounds
        base = f"/apis/apps/v1/namespaces/{quote(namespace or self._api.namespace(), safe='')}/statefulsets"
        self._paths = {role: f"{base}/{quote(name, safe='')}/scale" for role, name in groups.items()}

    async def count(self, role: WorkerRole) -> int:
        return (await self._size(role)).wanted

    async def scale(self, role: WorkerRole, count: int) -> None:
        path, size = self._path(role), await self._size(role)
        step = next_step(size, count, self._bounds)
        if step.count == size.wanted:
            if step.why:
                _log.info("not_scaled", role=role.value, count=size.wanted, asked=count, why=step.why)
            return
        patch = {"spec": {"replicas": step.count}}
        await asyncio.to_thread(self._api.call, "PATCH", path, patch)
        _log.info("scaled", role=role.value, before=size.wanted, count=step.count, asked=count, why=step.why)

    async def _size(self, role: WorkerRole) -> Size:
        path = self._path(role)
        answer = await asyncio.to_thread(self._api.call, "GET", path)
        # What is zero is left out.
        return Size(_replicas(answer, "spec", path), _replicas(answer, "status", path))

    def _path(self, role: WorkerRole) -> str:
        if role not in self._paths:
            raise errors.NotFoundError(f"no StatefulSet is named for {role.value} workers")
        return self._paths[role]


def _replicas(scale: Mapping[str, object], part: str, path: str) -> int:
    fields = scale.get(part, {})
    count = fields.get("replicas", 0) if isinstance(fields, dict) else None
    if scale.get("kind") != "Scale" or not isinstance(count, int) or count < 0:
        raise errors.InternalError(f"what {path} says is no Scale of autoscaling/v1")
    return count


def _parsed(content: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _refusal(status: int, content: bytes, what: str) -> errors.Error:
    said = (_parsed(content) or {}).get("message") or http.client.responses.get(status, "")
    text = f"the API server refused {what}: {status} {str(said)[:500]}"
    if status == http.client.UNAUTHORIZED:
        return errors.UnauthenticatedError(f"{text}; mount a token of the service account that the chart makes")
    if status == http.client.FORBIDDEN:
        return errors.PermissionDeniedError(f"{text}; install the chart with scaler.enabled, for its Role")
    if status == http.client.NOT_FOUND:
        return errors.NotFoundError(f"{text}; name a StatefulSet of the release, and its namespace")
    if status in (http.client.CONFLICT, http.client.TOO_MANY_REQUESTS) or status >= http.client.INTERNAL_SERVER_ERROR:
        return errors.UnavailableError(text, retry_after_s=_RETRY_AFTER_S)
    return errors.InvalidRequestError(text)
