"""The doctor's judgement over made-up hosts, and its examination of the one at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest

from transport import Op, Path, doctor
from transport.doctor import trial
from transport.doctor.advice import Finding, Level, judge, lets_in_process_numbers
from transport.doctor.facts import Facts, Host, Offer, Rate, RdmaPort, Trial, Ucx
from transport.doctor.host import chosen, hidepid, num_other_containers, rdma_ports
from transport.doctor.trial import Work, try_out, work_for
from transport.doctor.ucx import look_at_ucx, parse_offers
from transport.segments import make_segment

ROOT = File(doctor.__file__).parents[2]
TINY = Work(num_blocks=64, seconds=0.01)

HOST = Host(
    kernel="6.8.0-31-generic",
    shmem_huge_pages="never",
    available_nbytes=64 << 30,
    group_limit_nbytes=None,
    locked_limit_nbytes=8 << 20,
    max_open_files=20_000,
    user=1000,
    own_pid_namespace=False,
    num_other_containers=0,
    hidepid="",
    variables={},
    rdma_ports=(),
    rdma_permitted=False,
    cuda_devices=(),
)
TCP = (Offer("tcp", "eth0", ()), Offer("tcp", "lo", ()))
UCX = Ucx(home="/wheel", from_wheel=True, modules=("cma", "cuda"), offers=TCP)
RATES = (Rate(Op.WRITE, 9.5, 10.0, 0.95, 30, True), Rate(Op.READ, 9.0, 10.0, 0.9, 30, True))
MAPPED = Trial("default", "^sysv,cma,xpmem,knem", Path.MAPPED, "", "1.22.0", True, Path.MAPPED, "", RATES)
OVER_TCP = replace(MAPPED, title="tcp", expected=Path.RMA, path=Path.RMA)
FACTS = Facts(HOST, UCX, "", (MAPPED, OVER_TCP))

PORT = RdmaPort("mlx5_0", 1, "ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand")
RDMA_HOST = replace(HOST, rdma_ports=(PORT,), rdma_permitted=True, locked_limit_nbytes=None)
RC = Offer("rc_mlx5", "mlx5_0:1", ("host",))
RDMA_UCX = Ucx("/usr", False, ("cma", "ib", "rdmacm"), (*TCP, RC))
CUDA_HOST = replace(HOST, cuda_devices=("/dev/nvidia0", "/dev/nvidia1"))
CUDA_OFFERS = (Offer("cuda_copy", "cuda", ("cuda",)), Offer("cuda_ipc", "cuda", ("cuda",)))


def on(host: Host, ucx: Ucx | None = UCX) -> Facts:
    return replace(FACTS, host=host, ucx=ucx)


def with_trial(**changes: Any) -> Facts:
    return replace(FACTS, trials=(replace(MAPPED, **changes), OVER_TCP))


def small_pages(**changes: Any) -> Facts:
    return replace(with_trial(huge_pages=False), host=replace(HOST, **changes))


def texts(facts: Facts, section: str) -> str:
    return "\n".join(finding.text for finding in judge(facts) if finding.section == section)


def wanting(facts: Facts) -> list[Finding]:
    return [finding for finding in judge(facts) if finding.level in (Level.WARNING, Level.BROKEN)]


@pytest.mark.parametrize(
    "facts",
    [FACTS, on(RDMA_HOST, RDMA_UCX), on(CUDA_HOST, replace(UCX, offers=(*TCP, *CUDA_OFFERS)))],
    ids=["cpu", "rdma", "cuda"],
)
def test_of_a_sound_host_nothing_is_to_be_changed(facts: Facts) -> None:
    findings = judge(facts)
    assert not any(finding.change for finding in findings)
    assert {finding.level for finding in findings} == {Level.OK, Level.NOTE}
    assert "mapped write   9.50 GB/s, 0.95 of memcpy (10.00 GB/s)" in texts(facts, "Speed")
    sections = [finding.section for finding in findings]
    assert sorted(sections, key=sections.index) == sections, "the findings of a section stand together"


@pytest.mark.parametrize(
    ("facts", "level", "change"),
    [
        (Facts(HOST, None, "UCX was not found: pip install x", ()), Level.BROKEN, "UCX was not found: pip install x."),
        (with_trial(ucx_version="", failure="no gcc:\nget it.", path=None), Level.BROKEN, "start: no gcc: get it."),
        (on(HOST, replace(UCX, offers=None, no_offers="not there")), Level.WARNING, "/wheel/bin/ucx_info"),
        (on(replace(HOST, variables={"UCX_TLS": "tcp,self"})), Level.WARNING, "Unset UCX_TLS, or add posix"),
        (on(replace(HOST, variables={"UCX_TLS": "all"})), Level.WARNING, "UCX_TLS=^sysv,cma,xpmem,knem"),
        (on(replace(HOST, variables={"UCX_RNDV_THRESH": "8k"})), Level.WARNING, "Unset UCX_RNDV_THRESH."),
        (with_trial(path=None, failure="it went away"), Level.BROKEN, "exchange blocks: it went away."),
        (with_trial(path=Path.RMA, why_not_mapped="process 7 cannot be watched: x"), Level.BROKEN, "pidfd_open"),
        (with_trial(path=Path.RMA, why_not_mapped="/proc/7/fd/8 cannot be opened"), Level.BROKEN, "same capabilities"),
        (on(RDMA_HOST), Level.WARNING, "KVFERRY_UCX_HOME=/usr"),
        (on(replace(RDMA_HOST, rdma_ports=(replace(PORT, state="DOWN"),)), RDMA_UCX), Level.WARNING, "rdma link"),
        (on(replace(RDMA_HOST, rdma_permitted=False), RDMA_UCX), Level.WARNING, "--device=/dev/infiniband"),
        (on(RDMA_HOST, replace(RDMA_UCX, offers=TCP)), Level.WARNING, "ucx_info -d"),
        (on(replace(RDMA_HOST, locked_limit_nbytes=8 << 20), RDMA_UCX), Level.WARNING, "ulimit -l unlimited"),
        (on(CUDA_HOST, replace(UCX, modules=("cma",))), Level.WARNING, "Install a UCX with CUDA"),
        (replace(with_trial(ucx_version="1.20.0"), host=CUDA_HOST), Level.WARNING, "Install UCX 1.20.1 or newer"),
        (on(CUDA_HOST), Level.WARNING, "libcuda.so.1"),
        (on(replace(HOST, available_nbytes=1 << 29)), Level.WARNING, "Free memory"),
        (small_pages(shmem_huge_pages="deny"), Level.WARNING, "instead of deny"),
        (small_pages(kernel="5.15.0"), Level.WARNING, "Boot Linux 6.1"),
        (small_pages(shmem_huge_pages=""), Level.WARNING, "TRANSPARENT_HUGEPAGE"),
        (small_pages(), Level.WARNING, "compact_memory"),
        (on(replace(HOST, own_pid_namespace=True)), Level.WARNING, "pid: service:NAME"),
        (on(replace(HOST, max_open_files=256)), Level.WARNING, "ulimit -n 4096"),
        (with_trial(rates=(replace(RATES[0], intact=False),)), Level.BROKEN, "mapped writes lose data"),
        (with_trial(rates=(replace(RATES[1], of_memcpy=0.3),)), Level.WARNING, "mapped reads should come near memcpy"),
        (with_trial(failure="it hung"), Level.BROKEN, "cannot be moved: it hung."),
        (replace(FACTS, trials=(MAPPED, replace(OVER_TCP, path=None, failure="refused", rates=()))), Level.BROKEN,
         "exchange blocks over tcp: refused."),
    ],
)  # fmt: skip
def test_each_fault_has_one_finding_that_says_what_to_change(facts: Facts, level: Level, change: str) -> None:
    (finding,) = wanting(facts)
    assert finding.level is level
    assert change in finding.change
    assert finding.change.endswith(".")
    assert "\n" not in finding.change


def test_what_decides_who_can_map_is_told_and_blamed_on_nobody() -> None:
    facts = on(replace(HOST, own_pid_namespace=True, num_other_containers=2, hidepid="2"))
    told = texts(facts, "Neighbours on this host")
    assert "user 1000" in told
    assert "2 other container(s)" in told
    assert "hidepid=2" in told
    assert wanting(facts) == []
    assert "container" not in texts(FACTS, "Neighbours on this host")
    asked = replace(with_trial(path=Path.RMA, expected=Path.RMA), host=replace(HOST, variables={"UCX_TLS": "tcp"}))
    assert "not mapped, as UCX_TLS asks" in texts(asked, "Neighbours on this host")
    assert [finding.change for finding in wanting(asked)] == ["Unset UCX_TLS, or add posix to it."]


def test_the_way_of_cuda_memory_follows_from_what_ucx_offers() -> None:
    direct = replace(RC, memory=("host", "cuda"))
    ucx = replace(RDMA_UCX, modules=("cuda", "ib"), offers=(*TCP, direct, *CUDA_OFFERS))
    host = replace(RDMA_HOST, cuda_devices=("/dev/nvidia0",))
    assert "by cuda_ipc on this host, by RDMA straight from the device" in texts(on(host, ucx), "CUDA")
    staged = replace(ucx, offers=(*TCP, RC, CUDA_OFFERS[0]))
    assert "by copies through host memory on this host, by copies through host" in texts(on(host, staged), "CUDA")


def test_containers_are_counted_by_their_mounts_and_this_one_is_not(tmp_path: File) -> None:
    for process, mounts in {"self": 1, "1": 2, "7": 1, "8": 3, "9": 3}.items():
        (tmp_path / process / "ns").mkdir(parents=True)
        (tmp_path / process / "ns/mnt").symlink_to(f"mnt:[{mounts}]")
    (tmp_path / "10" / "ns").mkdir(parents=True)  # another user's
    assert num_other_containers(tmp_path) == 2


def test_without_measuring_nothing_is_said_of_speed() -> None:
    assert texts(replace(FACTS, trials=(replace(MAPPED, rates=()),)), "Speed") == ""


@pytest.mark.parametrize(
    ("ucx_tls", "expected"),
    [
        ("^sysv,cma,xpmem,knem", False),
        ("^sm", False),
        ("^sysv", True),
        ("posix,tcp,self", False),
        ("cma,tcp", True),
        ("shm", True),
    ],
)
def test_ucx_tls_that_reaches_by_process_number(ucx_tls: str, expected: bool) -> None:
    assert lets_in_process_numbers(ucx_tls) is expected


UCX_INFO = """
# Memory domain: mlx5_0
#     Component: ib
#         memory types: host (access,reg,cache), cuda (access,reg,cache)
#
#      Transport: rc_mlx5
#         Device: mlx5_0:1
#           Type: network
#  System device: mlx5_0 (0)
#
# Memory domain: tcp
#     Component: tcp
#         memory types:
#
#      Transport: tcp
#         Device: eth0
#      Transport: tcp
#         Device: lo
"""


def test_offers_are_read_from_ucx_info() -> None:
    assert parse_offers(UCX_INFO) == (Offer("rc_mlx5", "mlx5_0:1", ("host", "cuda")), *TCP)


def test_what_the_kernel_writes_is_read(tmp_path: File) -> None:
    assert chosen("always within_size advise [never] deny force") == "never"
    assert chosen("") == ""
    mounts = "sysfs /sys sysfs rw 0 0\nproc /proc proc rw,relatime,hidepid={} 0 0\n"
    assert [hidepid(mounts.format(value)) for value in ("invisible", "0", "off")] == ["invisible", "", ""]
    assert hidepid("proc /proc proc rw,relatime 0 0") == ""
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "link_layer").write_text("InfiniBand\n")
    assert rdma_ports(tmp_path) == (PORT,)
    assert rdma_ports(tmp_path / "none") == ()


def test_a_trial_takes_a_small_part_of_the_memory() -> None:
    assert work_for(64 << 30).num_blocks == trial.TRIAL_BLOCKS
    assert work_for(1 << 30).num_blocks * trial.BLOCK_NBYTES * 3 <= 1 << 27
    assert work_for(0).num_blocks == trial.PROBE_BLOCKS


def huge_pages_here() -> bool:
    segment = make_segment(TINY.num_blocks * trial.BLOCK_NBYTES, 1)
    try:
        return segment.huge
    finally:
        segment.unmap()


def neighbours() -> list[str]:
    """Those that this process has started and not seen the end of."""
    commands = [File(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    mine = [command for command in commands if _parent(command.parent) == os.getpid()]
    return [command.parent.name for command in mine if b"transport.doctor" in command.read_bytes()]


def _parent(process: File) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


@pytest.mark.parametrize(
    ("settings", "path"), [({"UCX_LOG_LEVEL": "info"}, Path.MAPPED), ({"UCX_TLS": "tcp,self"}, Path.RMA)]
)
def test_two_processes_move_blocks_and_are_gone(settings: dict[str, str], path: Path) -> None:
    told: list[str] = []
    done = try_out("here", settings, TINY, told.append)
    assert (done.failure, done.expected, done.path) == ("", path, path)
    assert done.ucx_version.count(".") == 2
    assert done.huge_pages is huge_pages_here()
    assert [rate.op for rate in done.rates] == [Op.WRITE, Op.READ]
    for rate in done.rates:
        assert rate.intact
        assert rate.num_rounds >= 1
        assert min(rate.gb_per_s, rate.memcpy_gb_per_s, rate.of_memcpy) > 0
    assert told == [f"{title}: {what}" for title, what in (
        ("here", "starting two processes"), (done.label, "measuring writes"), (done.label, "measuring reads")
    )]  # fmt: skip
    assert neighbours() == []


def test_bytes_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = trial._Process.ask

    def skipping_run(self: trial._Process, do: str, **arguments: Any) -> Any:
        return {"copying": [1.0], "moving": [1.0]} if do == "run" else ask(self, do, **arguments)

    monkeypatch.setattr(trial._Process, "ask", skipping_run)
    assert [rate.intact for rate in try_out("here", {}, TINY, lambda what: None).rates] == [False, False]


@pytest.mark.parametrize(
    ("settings", "failure"),
    [
        ({"UCX_TLS": "nonsense"}, "UCX could not start with UCX_TLS=nonsense"),
        ({"KVFERRY_UCX_HOME": "/nowhere"}, "no libucp.so.0 under /nowhere"),
        ({"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}, "a process of the trial ended with status 1"),
    ],
)
def test_what_does_not_start_is_told_in_its_own_words(settings: dict[str, str], failure: str) -> None:
    done = try_out("here", settings, TINY, lambda what: None)
    assert failure in done.failure
    assert (done.ucx_version, done.path, done.rates) == ("", None, ())


def test_a_trial_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TIMEOUT_S", 0.01)
    done = try_out("here", {}, TINY, lambda what: None)
    assert done.failure == "a process of the trial did not tell_version within 0.01 s"


def test_this_host_is_examined_from_the_command_line() -> None:
    environment = {**os.environ, "UCX_TLS": "tcp,self"}
    done = subprocess.run(
        [sys.executable, "-m", "transport.doctor", "--json", "--no-measure"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert (done.returncode, report["broken"]) == (0, False)
    assert [(each["expected"], each["path"], each["rates"]) for each in report["facts"]["trials"]] == [
        ("rma", "rma", [])
    ]
    assert report["facts"]["host"]["variables"]["UCX_TLS"] == "tcp,self"
    assert "Unset UCX_TLS, or add posix to it." in [finding["change"] for finding in report["findings"]]


def test_without_ucx_it_says_so_and_ends_with_1() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transport.doctor"],
        cwd=ROOT, env={**os.environ, "KVFERRY_UCX_HOME": "/nowhere"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "XX no UCX was found" in done.stdout
    assert done.stdout.endswith("point KVFERRY_UCX_HOME at a UCX installation's prefix.\n")


def test_a_ucx_without_ucx_info_is_told_apart_from_none(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib" / "ucx").mkdir(parents=True)
    for name in ("libucp.so.0", "ucx/libuct_ib.so.0", "ucx/libuct_ib.so.0.0.0", "ucx/libuct_rdmacm.so"):
        (tmp_path / "lib" / name).touch()
    monkeypatch.setenv("KVFERRY_UCX_HOME", str(tmp_path))
    why = f"there is no {tmp_path}/bin/ucx_info"
    assert look_at_ucx() == Ucx(str(tmp_path), False, ("ib", "rdmacm"), None, why)


def test_this_ucx_offers_tcp() -> None:
    ucx = look_at_ucx()
    assert ucx.offers is not None
    assert "tcp" in {offer.transport for offer in ucx.offers}
    assert {"cma", "cuda"} <= set(ucx.modules) or not ucx.from_wheel
