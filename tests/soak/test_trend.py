from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack

import pytest

from tests.soak.samples import SHARED, Samples
from tests.soak.trend import Held, trend


def test_a_warm_up_is_no_growth_and_a_slope_after_it_is() -> None:
    warm = [float(min(n * 10, 300)) for n in range(120)]
    assert not trend("w", Held.MEMORY, warm).grows
    leaking = [300.0 + n * 0.2 for n in range(120)]
    assert trend("w", Held.MEMORY, leaking).grows


def test_a_process_of_hundreds_of_mib_may_differ_by_a_share() -> None:
    assert not trend("w", Held.MEMORY, [1000.0] * 60 + [1020.0] * 60).grows
    assert trend("w", Held.MEMORY, [1000.0] * 60 + [1040.0] * 60).grows


def test_one_descriptor_a_request_is_seen() -> None:
    assert trend("g", Held.DESCRIPTORS, [40.0 + n for n in range(120)]).grows
    assert not trend("g", Held.DESCRIPTORS, [40.0 + n % 5 for n in range(120)]).grows


def test_too_few_samples_tell_nothing() -> None:
    with pytest.raises(ValueError, match="3 samples tell no trend"):
        trend("w", Held.THREADS, [1.0] * 3)


_GROWS = """
import sys
kept = []
print("ready", flush=True)
for line in sys.stdin:
    kept.append(b"x" * (16 << 20))
    print(len(kept), flush=True)
"""


def test_a_process_is_sampled() -> None:
    samples = Samples()
    command = (sys.executable, "-I", "-c", _GROWS)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(4):
            assert process.stdout.readline()
            samples.take({"it": process.pid})
            process.stdin.write("more\n")
            process.stdin.flush()
        process.stdin.close()
    memory = samples.series["it", Held.MEMORY]
    assert memory[3] - memory[1] == pytest.approx(32, abs=2)
    assert samples.series["it", Held.THREADS] == [1] * 4
    with pytest.raises(OSError):
        samples.take({"gone": 2**22 + 1})


_MAPS = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
sum(mapped[::4096])
print("ready", flush=True)
sys.stdin.readline()
"""


def test_what_two_processes_map_is_counted_once() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file, ExitStack() as stack:
        file.write(bytes(16 << 20))
        file.flush()
        command = (sys.executable, "-I", "-c", _MAPS, file.name)
        processes = []
        for _ in range(2):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline()
        samples = Samples()
        samples.take({str(number): process.pid for number, process in enumerate(processes)})
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
    assert samples.series[SHARED, Held.MEMORY] == [pytest.approx(16, abs=0.5)]
    assert samples.series["0", Held.MEMORY][0] < 16
