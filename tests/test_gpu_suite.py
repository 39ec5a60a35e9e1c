"""`make test-gpu` where there is no GPU, and the order of what it runs where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_without_a_gpu_it_fails_with_one_sentence() -> None:
    done = run("tests.gpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "make test-gpu: no CUDA device, or a torch without CUDA\n"


def test_as_part_of_all_tests_it_is_skipped() -> None:
    done = run("pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "tests/gpu")
    assert done.returncode == 0, done.stdout
    assert " skipped in" in done.stdout.splitlines()[-1]


def test_what_compiles_the_least_comes_first() -> None:
    done = run("pytest", "-p", "no:cacheprovider", "-q", "--collect-only", "-m", "gpu", "tests/gpu")
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    modules = [module for module, _ in groupby(tests, key=lambda test: Path(test.partition("::")[0]).stem)]
    assert sorted(modules[:4]) == ["test_host_copies", "test_lending", "test_reference", "test_transfer"]
    assert modules[4:] == [
        f"test_{what}" for what in ("operations", "attention", "sampler", "runner", "split", "ranks")
    ]
