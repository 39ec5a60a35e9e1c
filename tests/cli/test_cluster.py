"""Supervision of real, tiny processes."""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from kvferry.cli.cluster import Died, Event, LocalCluster, Ready, Restarted, Stopped, Timing, in_few_words, readable
from kvferry.cli.members import ClusterConfig, ClusterError, Member, Role, plan
from kvferry.cli.ports import PortError, check_free, pick_free
from kvferry.cli.progress import _Doing
from tests.certificates import make_authority

ROOT = Path(__file__).resolve().parents[2]
QUICK = Timing(start_s=20, stop_s=10, backoff_s=0.05, max_backoff_s=0.2, steady_s=60)

WAITS = "import signal; signal.pause()"
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
while True:
    signal.pause()
"""
DIES = "import sys; print('loading', flush=True); sys.exit('the weights are missing')"
# A health service that says NOT_SERVING first and SERVING a little later, like a worker that loads its model.
SERVES = """
import sys, threading
from concurrent import futures
import grpc
loaded = threading.Event()
def watch(request, context):
    yield b"\\x08\\x02"
    loaded.wait()
    yield b"\\x08\\x01"
    threading.Event().wait()
server = grpc.server(futures.ThreadPoolExecutor(2))
handler = grpc.unary_stream_rpc_method_handler(watch)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Watch": handler}),))
server.add_insecure_port(sys.argv[1])
server.start()
threading.Timer(float(sys.argv[2]), loaded.set).start()
import signal
signal.pause()
"""


def member(name: str, code: str, *arguments: str, health_address: str | None = None) -> Member:
    return Member(name, Role.PREFILL, (sys.executable, "-c", code, *arguments), health_address)


class Recorder(queue.Queue[Event]):
    """Collects events; tests wait for the next one."""

    def __call__(self, event: Event) -> None:
        self.put(event)

    def next(self) -> Event:
        return self.get(timeout=20)


def ends(pid: int, within_s: float = 10) -> bool:
    """Whether the process, anybody's child, ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within_s)[0])
    finally:
        os.close(descriptor)


def wait_for_line(path: Path, line: str) -> None:
    deadline = time.monotonic() + 20
    while line not in path.read_text():
        assert time.monotonic() < deadline, f"{line!r} never appeared in {path}"
        time.sleep(0.01)


def test_starts_in_order_and_stops_in_reverse(tmp_path: Path) -> None:
    events = Recorder()
    with LocalCluster([member("a", WAITS), member("b", WAITS)], tmp_path, on_event=events, timing=QUICK) as cluster:
        first, second = events.next(), events.next()
        assert isinstance(first, Ready)
        assert isinstance(second, Ready)
        assert (first.name, second.name) == ("a", "b")
        pids = [cluster.pid("a"), cluster.pid("b")]
        assert pids == [first.pid, second.pid]
        assert all(os.getsid(pid) == pid for pid in pids if pid is not None), "a terminal's Ctrl-C must not reach them"
    assert [events.next(), events.next()] == [
        Stopped("b", -signal.SIGTERM, killed=False),
        Stopped("a", -signal.SIGTERM, killed=False),
    ]
    assert cluster.pid("a") is None
    cluster.stop()
    assert events.empty(), "stopping again does nothing"


def test_ready_means_that_the_health_service_says_serving(tmp_path: Path) -> None:
    (port,) = pick_free(1)
    address = f"127.0.0.1:{port}"
    began = time.monotonic()
    with LocalCluster([member("a", SERVES, address, "0.5", health_address=address)], tmp_path, timing=QUICK) as cluster:
        assert time.monotonic() - began >= 0.5
        assert cluster.address("a") == address
        old = cluster.pid("a")
        cluster.kill("a")
        cluster.wait_ready("a", 20)
        assert cluster.pid("a") not in (None, old)


def test_who_waits_for_a_member_that_dies_meanwhile_gets_the_next(tmp_path: Path) -> None:
    events = Recorder()
    (port,) = pick_free(1)
    address = f"127.0.0.1:{port}"
    with LocalCluster(
        [member("a", SERVES, address, "0.7", health_address=address)], tmp_path, on_event=events, timing=QUICK
    ) as cluster:
        cluster.kill("a")
        pids = []
        while len(pids) < 2:
            if isinstance(event := events.next(), Restarted):
                pids.append(event.pid)
                if len(pids) == 1:
                    threading.Timer(0.3, cluster.kill, ["a"]).start()
                    cluster.wait_ready("a", 20)
        assert cluster.pid("a") == pids[1]


def test_not_ready_in_time(tmp_path: Path) -> None:
    (port,) = pick_free(1)
    address = f"127.0.0.1:{port}"
    cluster = LocalCluster(
        [member("slow", SERVES, address, "60", health_address=address)], tmp_path, timing=Timing(start_s=1, stop_s=5)
    )
    with pytest.raises(ClusterError, match=r"slow was not ready in time; log: .*slow\.log"):
        cluster.start()
    assert cluster.pid("slow") is None


def test_a_death_during_the_start_is_told_at_once_with_its_last_words(tmp_path: Path) -> None:
    (port,) = pick_free(1)
    never = member("never", WAITS, health_address=f"127.0.0.1:{port}")
    events = Recorder()
    cluster = LocalCluster([never, member("broken", DIES)], tmp_path, on_event=events, timing=QUICK)
    began = time.monotonic()
    with pytest.raises(ClusterError, match="broken ended with exit status 1 during the start") as caught:
        cluster.start()
    assert time.monotonic() - began < 15
    assert caught.value.log_tail == ("loading", "the weights are missing")
    assert cluster.pid("never") is None
    assert events.next() == Stopped("never", -signal.SIGTERM, killed=False)


def test_the_dead_come_back_with_growing_pauses(tmp_path: Path) -> None:
    events = Recorder()
    with LocalCluster([member("a", WAITS)], tmp_path, on_event=events, timing=QUICK) as cluster:
        events.next()
        pauses = []
        for _ in range(4):
            old = cluster.pid("a")
            cluster.kill("a")
            died, restarted = events.next(), events.next()
            assert isinstance(died, Died)
            assert isinstance(restarted, Restarted)
            assert died.status == -signal.SIGKILL
            assert restarted.pid == cluster.pid("a") != old
            pauses.append(died.restart_in_s)
    assert pauses == [0.05, 0.1, 0.2, 0.2]


def test_a_steady_life_forgives_earlier_deaths(tmp_path: Path) -> None:
    events = Recorder()
    timing = Timing(backoff_s=0.01, max_backoff_s=5, steady_s=0)
    with LocalCluster([member("a", WAITS)], tmp_path, on_event=events, timing=timing) as cluster:
        events.next()
        for _ in range(3):
            cluster.kill("a")
            died = events.next()
            assert isinstance(died, Died)
            assert died.restart_in_s == 0.01
            events.next()


def test_without_restart_the_dead_stay_dead(tmp_path: Path) -> None:
    events = Recorder()
    with LocalCluster([member("a", WAITS)], tmp_path, on_event=events, restart=False, timing=QUICK) as cluster:
        events.next()
        cluster.kill("a", signal.SIGTERM)
        died = events.next()
        assert isinstance(died, Died)
        assert died.restart_in_s is None
        assert cluster.pid("a") is None
    assert events.empty()


def test_two_clusters_do_not_share_their_logs(tmp_path: Path) -> None:
    with LocalCluster([member("a", WAITS)], tmp_path, timing=QUICK):
        (tmp_path / "a.log").write_text("the first one's words\n")
        second = LocalCluster([member("a", WAITS)], tmp_path, timing=QUICK)
        with pytest.raises(ClusterError, match="--log-dir"):
            second.start()
        assert (tmp_path / "a.log").read_text() == "the first one's words\n"
    with LocalCluster([member("a", WAITS)], tmp_path, timing=QUICK):
        pass  # free again


def test_stop_kills_the_stubborn_and_what_they_started(tmp_path: Path) -> None:
    child = f"import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', {WAITS!r}]).pid, flush=True)\n"
    events = Recorder()
    timing = Timing(stop_s=0.3)
    cluster = LocalCluster([member("a", child + STUBBORN)], tmp_path, on_event=events, timing=timing)
    cluster.start()
    wait_for_line(tmp_path / "a.log", "deaf")
    grandchild = int((tmp_path / "a.log").read_text().split()[0])
    events.next()
    cluster.stop()
    assert events.next() == Stopped("a", -signal.SIGKILL, killed=True)
    assert ends(grandchild)


def test_stop_does_not_wait_out_a_pause_before_a_restart(tmp_path: Path) -> None:
    events = Recorder()
    cluster = LocalCluster(
        [member("a", WAITS)], tmp_path, on_event=events, timing=Timing(backoff_s=60, max_backoff_s=60)
    )
    cluster.start()
    cluster.kill("a")
    assert isinstance(events.next(), Ready)
    assert isinstance(events.next(), Died)
    began = time.monotonic()
    cluster.stop()
    assert time.monotonic() - began < 10
    assert events.empty()


SUPERVISOR = """
import sys, threading
from pathlib import Path
from kvferry.cli.cluster import LocalCluster
from tests.cli.test_cluster import STUBBORN, member
cluster = LocalCluster([member("a", STUBBORN), member("b", STUBBORN)], Path(sys.argv[1]))
cluster.start()
print(cluster.pid("a"), cluster.pid("b"), flush=True)
threading.Event().wait()
"""


def test_nobody_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        for name in "ab":
            wait_for_line(tmp_path / f"{name}.log", "deaf")
        assert len(pids) == 2
        supervisor.kill()
    assert all(ends(pid) for pid in pids)


def test_the_leash_refuses_when_its_holder_is_gone() -> None:
    leash = ROOT / "kvferry" / "cli" / "leash.py"
    stranger = os.getppid()
    done = subprocess.run(
        [sys.executable, str(leash), str(stranger), "echo", "ran"],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "has ended" in done.stderr


def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=rf"^port {port} on 127.0.0.1 is taken by another process; .* --http-port$"):
            check_free("127.0.0.1", port, "--http-port")
    check_free("127.0.0.1", port, "--http-port")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(PortError, match=r"192\.0\.2\.1 is not an address of this machine"):
        check_free("192.0.2.1", 1234, "--grpc-port")


def test_picked_ports_differ_and_avoid() -> None:
    ports = pick_free(20)
    assert len(set(ports)) == 20
    assert not set(pick_free(5, avoid=ports)) & set(ports)


def test_plan_wires_the_members_to_each_other() -> None:
    config = ClusterConfig(
        num_prefill=2,
        num_decode=1,
        grpc_port=0,
        http_port=0,
        host="0.0.0.0",
        insecure=True,
        dtype="bfloat16",
        kv_memory="64MiB",
        host_kv_memory="1GiB",
        speculate="auto",
        devices=("cuda:0", "cuda:1", "cuda:2"),
    )
    planned = plan(config, ROOT)
    names = [m.name for m in planned.members]
    assert names == ["directory", "prefill-0", "prefill-1", "decode-0", "gateway"]
    flags = {m.name: dict(zip(m.command[3::2], m.command[4::2], strict=True)) for m in planned.members}
    directory = flags["directory"]["--listen"]
    assert {flags[name]["--directory"] for name in names[1:]} == {directory}
    assert flags["prefill-1"]["--worker-id"] == "prefill-1"
    assert flags["prefill-1"]["--speculate"] == flags["decode-0"]["--speculate"] == "auto"
    assert (flags["decode-0"]["--dtype"], flags["decode-0"]["--kv-memory"]) == ("bfloat16", "64MiB")
    assert flags["prefill-0"]["--host-kv-memory"] == "1GiB"
    workers = ("prefill-0", "prefill-1", "decode-0")
    assert [flags[name]["--device"] for name in workers] == ["cuda:0", "cuda:1", "cuda:2"]
    shared = plan(
        ClusterConfig(num_prefill=1, num_decode=2, grpc_port=0, http_port=0, devices=("cuda:0", "cuda:1")), ROOT
    )
    given = [m.command[m.command.index("--device") + 1] for m in shared.members if "--device" in m.command]
    assert given == ["cuda:0", "cuda:1", "cuda:0"]
    assert not {"--device"} & (flags["gateway"].keys() | flags["directory"].keys())
    assert "--dtype" not in flags["gateway"]
    assert planned.members[-1].command[1:3] == ("-m", "gateway")
    assert planned.members[1].command[1:3] == ("-m", "services.prefill")
    assert flags["gateway"]["--listen"].startswith("0.0.0.0:")
    assert planned.grpc_address.startswith("127.0.0.1:")
    assert all(flags[name]["--listen"].startswith("127.0.0.1:") for name in names[:-1])
    listens = [flags[name][flag] for name in names for flag in ("--listen", "--http-listen", "--metrics-port")
               if flag in flags[name]]  # fmt: skip
    assert len({address.rpartition(":")[2] for address in listens}) == len(listens) == 10


def test_a_plan_with_two_gateways_names_both_addresses() -> None:
    planned = plan(ClusterConfig(num_gateways=2, grpc_port=0, http_port=0), ROOT)
    gateways = planned.members[-2:]
    assert [m.name for m in gateways] == ["gateway-0", "gateway-1"]
    assert planned.grpc_address == ",".join(m.health_address or "" for m in gateways)
    flags = [dict(zip(m.command[3::2], m.command[4::2], strict=True)) for m in gateways]
    assert len({f[flag] for f in flags for flag in ("--listen", "--http-listen")}) == 4
    assert [m.metrics_url for m in gateways] == [f"http://{f['--http-listen']}/metrics" for f in flags]


def test_a_gateway_of_several_processes_is_one_member() -> None:
    gateway = plan(ClusterConfig(gateway_processes=3, grpc_port=0, http_port=0), ROOT).members[-1]
    assert dict(zip(gateway.command[3::2], gateway.command[4::2], strict=True))["--processes"] == "3"


def test_beyond_this_machine_the_gateway_wants_certificates(tmp_path: Path) -> None:
    open_to_all = ClusterConfig(grpc_port=0, http_port=0, host="0.0.0.0")
    with pytest.raises(ClusterError, match=r"others than this machine reach 0\.0\.0\.0.*--insecure"):
        plan(open_to_all, ROOT)
    with pytest.raises(ClusterError, match=r"--tls: there is no .*ca\.pem.*kvferry certs init"):
        plan(replace(open_to_all, tls=tmp_path), ROOT)
    make_authority(tmp_path)
    planned = plan(replace(open_to_all, tls=tmp_path), ROOT)
    assert planned.http_url.startswith("https://")
    for member, role in zip(planned.members, ("directory", "worker", "worker", "gateway"), strict=True):
        flags = dict(zip(member.command[3::2], member.command[4::2], strict=True))
        assert flags["--tls-cert"] == str(tmp_path / f"{role}.pem")
        assert flags["--tls-key"] == str(tmp_path / f"{role}.key")
        assert flags["--tls-ca"] == str(tmp_path / "ca.pem")


def test_each_role_may_have_blocks_of_its_own() -> None:
    config = ClusterConfig(grpc_port=0, http_port=0, dtype="bfloat16", prefill_dtype="float32", decode_block_size=32)
    flags = {m.name: dict(zip(m.command[3::2], m.command[4::2], strict=True)) for m in plan(config, ROOT).members}
    assert flags["prefill-0"]["--dtype"] == "float32"
    assert flags["decode-0"]["--dtype"] == "bfloat16"
    assert "--block-size" not in flags["prefill-0"]
    assert flags["decode-0"]["--block-size"] == "32"
    config = ClusterConfig(grpc_port=0, http_port=0, decode_dtype="float16", prefill_block_size=8)
    flags = {m.name: dict(zip(m.command[3::2], m.command[4::2], strict=True)) for m in plan(config, ROOT).members}
    assert "--dtype" not in flags["prefill-0"]
    assert flags["prefill-0"]["--block-size"] == "8"
    assert flags["decode-0"]["--dtype"] == "float16"
    assert "--block-size" not in flags["decode-0"]


def test_workers_get_cores_of_their_own_where_one_is_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def pins(num_cores: int, **asked: Any) -> list[str | None]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4, 4 + num_cores)))
        planned = plan(ClusterConfig(grpc_port=0, http_port=0, **asked), ROOT)
        flags = [dict(zip(m.command[3::2], m.command[4::2], strict=True)) for m in planned.members]
        return [f.get("--cpus") for f in flags if "--threads" in f]

    assert pins(2) == pins(4) == [None, None]
    assert pins(5) == ["4,5", "6,7"]
    assert pins(3, pin=False) == [None, None]
    assert pins(2, pin=True) == ["4", "5"]
    with pytest.raises(ClusterError, match="--pin needs 6 cores for the threads of 2 workers, and there are 4; lower"):
        pins(4, threads=3, pin=True)
    assert pins(7, prefill_tp=2) == ["4,5,6,7", "8,9"], "each rank has its threads"
    assert pins(6, decode_tp=2, threads=1) == ["4", "5,6"]


def test_every_planned_flag_is_one_that_the_service_knows() -> None:
    """The services' own --help is the other side of this contract."""
    config = ClusterConfig(
        grpc_port=0, http_port=0, dtype="float32", decode_block_size=32, decode_tp=2, kv_memory="64MiB"
    )
    planned = plan(config, ROOT)
    for each in planned.members:
        if each.role is Role.PREFILL:
            continue  # the same program text as decode, and slow to load
        shown = subprocess.run(
            [*each.command[:3], "--help"], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert shown.returncode == 0, shown.stderr
        for flag in each.command[3::2]:
            assert f"{flag} " in shown.stdout or f"{flag}\n" in shown.stdout, f"{each.name} has no {flag}"


def test_a_relative_model_path_is_found_from_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.chdir(tmp_path)
    command = plan(ClusterConfig(model="tiny.gguf", grpc_port=0, http_port=0), ROOT).members[-1].command
    assert command[command.index("--model") + 1] == str(tmp_path / "tiny.gguf")


def test_without_a_clone_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kvferry

    monkeypatch.setattr(kvferry, "__file__", str(tmp_path / "site-packages" / "kvferry" / "__init__.py"))
    with pytest.raises(ClusterError, match="clone the repository"):
        LocalCluster.from_config(ClusterConfig())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"event": "packing_weights", "dtype": "int8"}', "packing weights"),
        ('{"event": "packing_weights", "done": 12, "total": 30}', "packing weights, 12 of 30"),
        ("Traceback (most recent call last):", ""),
        ('["event"]', ""),
        (b"\xff{", ""),
    ],
)
def test_what_a_member_does_is_told_in_a_few_words(line: str | bytes, words: str) -> None:
    assert in_few_words(line) == words


def test_what_a_member_does_is_its_last_structured_line(tmp_path: Path) -> None:
    lines = ['{"event": "opening_model"}', '{"event": "packing_weights", "done": 1, "total": 2}', "hm"]
    says = f"print(*{lines}, sep=chr(10), flush=True)\n"
    with LocalCluster([member("a", says + WAITS)], tmp_path) as cluster:
        give_up_s = time.monotonic() + 10
        while not cluster.doing("a"):
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        assert cluster.doing("a") == "packing weights, 1 of 2"
        shown = _Doing(cluster.doing)
        progress = Progress()
        id_ = progress.add_task("a", total=1)
        task = progress.tasks[id_]
        assert shown.render(task).plain == "packing weights, 1 of 2"
        progress.update(id_, completed=1)
        assert shown.render(task).plain == ""


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain words", "plain words"),
        ('{"event": "ready", "level": "info", "port": 1}', "info ready"),
        (
            '{"event": "failed", "level": "error", "exception": "Traceback\\nValueError: no"}',
            "error failed (ValueError: no)",
        ),
        ('["event"]', '["event"]'),
    ],
)
def test_log_lines_are_made_readable(line: str, shown: str) -> None:
    assert readable(line) == shown


def test_losing_patience_kills_at_once(tmp_path: Path) -> None:
    timing = Timing(stop_s=60)
    cluster = LocalCluster([member("a", STUBBORN), member("b", STUBBORN)], tmp_path, timing=timing)
    cluster.start()
    for name in "ab":
        wait_for_line(tmp_path / f"{name}.log", "deaf")
    pids = [cluster.pid("a"), cluster.pid("b")]
    impatience = threading.Timer(0.2, cluster.kill_now)
    impatience.start()
    began = time.monotonic()
    cluster.stop()
    impatience.join()
    assert time.monotonic() - began < 20
    assert all(ends(pid) for pid in pids if pid is not None)
