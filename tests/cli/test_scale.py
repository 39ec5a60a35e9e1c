"""More and fewer workers of a cluster that runs, asked for as kvferry scale and the planner do."""

from __future__ import annotations

import queue
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry import _supervisor, errors
from kvferry.cli import make_app
from kvferry.cli.cluster import Added, Event, Leaving, LocalCluster, Ready, Stopped
from kvferry.cli.control import Control
from kvferry.cli.crew import Crew
from kvferry.cli.members import Autoscale, ClusterConfig, ClusterError, Member, Role, plan
from kvferry.cli.ports import pick_free
from kvferry.types import WorkerRole
from services.planner.local import LocalReplicas
from services.planner.online.config import PlannerConfig
from services.runtime.config import load
from tests.certificates import make_authority
from tests.cli.test_cluster import QUICK, ROOT, STUBBORN, ends

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE


class Played:
    """A cluster of fake workers: prefill-0, decode-0 and decode-1, of which the last is a prefill worker by now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: queue.Queue[Event] = queue.Queue()
        members = [
            self.member(Role.PREFILL, 0, load=3),
            self.member(Role.DECODE, 0),
            self.member(Role.DECODE, 1, "prefill"),
        ]
        self.cluster = LocalCluster(members, folder, on_event=self.events.put, timing=QUICK)
        self.leaving: set[str] = set()
        self.crew = Crew(self.cluster, self.member, drain_s=60)

    def member(self, role: Role, number: int, now: str = "", load: int = 0) -> Member:
        address, name = f"127.0.0.1:{pick_free(1)[0]}", f"{role.value}-{number}"
        module = (sys.executable, "-m", "tests.cli.fake_worker")
        command = (*module, address, now or role.value, str(load), str(self.may_go(name)))
        return Member(name, role, command, address, cwd=ROOT)

    def may_go(self, name: str) -> Path:
        return self.folder / f"{name}.may-go"

    def awaits(self, kind: type[Event], name: str = "") -> Event:
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, kind) and name in ("", event.name):
                return event

    @property
    def names(self) -> set[str]:
        return {member.name for member in self.cluster.members}


@contextmanager
def played(folder: Path) -> Iterator[Played]:
    one = Played(folder)
    with one.cluster, Control(folder, one.crew.scale):
        yield one


async def test_workers_start_and_those_that_leave_finish_first(tmp_path: Path) -> None:
    with played(tmp_path) as it:
        replicas = LocalReplicas(tmp_path)
        assert (await replicas.count(PREFILL), await replicas.count(DECODE)) == (2, 1)
        await replicas.scale(DECODE, 2)
        it.awaits(Added, "decode-2")
        it.awaits(Ready, "decode-2")
        assert await replicas.count(DECODE) == 2

        await replicas.scale(PREFILL, 1)  # decode-1 is one by now, and has less to finish than prefill-0
        it.awaits(Leaving, "decode-1")
        assert await replicas.count(PREFILL) == 1
        await replicas.scale(PREFILL, 1)
        pid = it.cluster.pid("decode-1")
        assert pid is not None, "it has not finished"
        it.may_go("decode-1").touch()
        assert it.awaits(Stopped, "decode-1") == Stopped("decode-1", 0, killed=False)
        assert it.may_go("decode-1").with_suffix(".asked").exists()
        assert it.names == {"prefill-0", "decode-0", "decode-2"}
        assert ends(pid)


def test_stopping_the_cluster_does_not_wait_for_one_that_leaves(tmp_path: Path) -> None:
    with played(tmp_path) as it:
        assert it.crew.scale({PREFILL: 0, DECODE: 1}) == {PREFILL: 0, DECODE: 1}
        while not {"prefill-0", "decode-1"} <= it.leaving:
            it.leaving.add(it.awaits(Leaving).name)
        pids = [it.cluster.pid(member.name) for member in it.cluster.members]
    assert len(pids) == 3
    assert all(pid is not None and ends(pid) for pid in pids)


def test_one_that_does_not_end_after_draining_is_killed_and_not_started_again(tmp_path: Path) -> None:
    events: queue.Queue[Event] = queue.Queue()
    deaf = Member("decode-0", Role.DECODE, (sys.executable, "-c", STUBBORN))
    cluster = LocalCluster([deaf], tmp_path, on_event=events.put, timing=replace(QUICK, stop_s=2))
    with cluster:
        while "deaf" not in (tmp_path / "decode-0.log").read_text():
            time.sleep(0.02)
        cluster.retire("decode-0", lambda: None)
        assert [type(event) for event in (events.get(), events.get())] == [Ready, Leaving]
        assert events.get(timeout=20) == Stopped("decode-0", -signal.SIGKILL, killed=True)
        assert cluster.members == ()


def test_whoever_asks_is_told_what_is_wrong(tmp_path: Path) -> None:
    asked: list[object] = []

    def scale(counts: object) -> dict[WorkerRole, int]:
        asked.append(counts)
        return {PREFILL: 2, DECODE: 1}

    app, runner = make_app(rich=False), CliRunner()
    where = ["--log-dir", str(tmp_path)]
    with Control(tmp_path, scale):
        assert stat.S_IMODE((tmp_path / _supervisor.SOCKET_NAME).stat().st_mode) == 0o600
        done = runner.invoke(app, ["scale", "prefill=2", *where])
        assert (done.exit_code, done.stderr) == (0, "2 prefill, 1 decode workers\n")
        assert runner.invoke(app, ["scale", *where]).exit_code == 0
        assert asked == [{PREFILL: 2}, {}]
        with pytest.raises(errors.InvalidRequestError, match="decode=0: write 1 to 256"):
            _supervisor.ask(tmp_path, {DECODE: 0})
        assert len(asked) == 2
        assert runner.invoke(app, ["scale", "decode=-1", *where]).exit_code == 2
    done = runner.invoke(app, ["scale", *where])
    assert done.exit_code == 1
    assert "start one, or name its --log-dir" in done.stderr


def test_a_planner_is_wired_to_gateway_directory_and_supervisor(tmp_path: Path) -> None:
    make_authority(tmp_path)
    config = ClusterConfig(
        grpc_port=0, http_port=0, tls=tmp_path, log_dir=tmp_path, autoscale=Autoscale(2, 3, ttft_s=1.0, itl_s=0.05)
    )
    planned = plan(config, ROOT)
    planner = planned.members[-1]
    told = load(PlannerConfig, planner.command[3:], "planner", {})
    assert told.directory == (planned.members[0].health_address,)
    assert told.gateway_metrics == (f"{planned.http_url}/metrics",)
    assert (told.apply, told.supervisor, told.max_workers, told.ttft_s) == (True, tmp_path, 3, 1.0)
    assert told.tls_cert == tmp_path / "operator.pem"
    assert planned.make_worker is not None
    more = planned.make_worker(Role.DECODE, 1)
    assert (more.name, more.role) == ("decode-1", Role.DECODE)
    assert more.health_address not in {member.health_address for member in planned.members}
    with pytest.raises(ClusterError, match=r"3 to 4 workers in all, not 1 \+ 1"):
        plan(ClusterConfig(grpc_port=0, http_port=0, autoscale=Autoscale(3, 4, 1.0, 0.05)), ROOT)
