"""Ranks as real processes, over gloo."""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import transport
from services.engine.model_files import ModelFiles, open_model
from services.engine.runner import TorchRunner
from services.engine.weights import load_weights
from services.runtime.process import ProcessIdentity, has_ended
from services.worker.ranks import RankLostError, Ranks
from tests.tiny_model import save_tiny_model
from tests.worker.leading import NUM_BLOCKS, SAMPLINGS, layout, setup, tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Of its three KV heads, one rank has two."""
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_model(directory)
    return open_model(str(directory))


class Leader:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def hear(self, what: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # of which some are of the log
            if line.startswith(f"{what}: "):
                return line.removeprefix(f"{what}: ").strip()
        raise AssertionError(f"it ended without {what}")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@contextmanager
def leader(files: ModelFiles, dtype: str = "float32", *options: str) -> Iterator[Leader]:
    command = [sys.executable, "-m", "tests.worker.leading", str(files.path), dtype, *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Leader(process)
        finally:
            process.kill()


def identity(pid: int) -> ProcessIdentity:
    stat = Path(f"/proc/{pid}/stat").read_text()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return ProcessIdentity(boot, namespace, pid, int(stat.rsplit(") ", 1)[1].split()[19]))


def test_two_processes_draw_the_tokens_of_one_until_one_is_killed(tiny: ModelFiles) -> None:
    """Greedy and seeded."""
    own = layout(tiny, "float32", 1)
    arena = memoryview(bytearray(NUM_BLOCKS * own.block_nbytes))
    alone = TorchRunner(tiny.config, load_weights(tiny.config, tiny.path, "float32"), own, arena, NUM_BLOCKS, 1)
    expected = [tokens(tiny, alone.run, sampling) for sampling in SAMPLINGS]
    assert expected[0] != expected[1]
    with leader(tiny) as two:
        for of_sampling in expected:
            assert two.hear("tokens") == str(of_sampling)
        two.tell("kill")
        for what in ("step", "lost"):
            says = two.hear(what)
            assert says.startswith("rank 1 of 2 (process ")
            assert says.endswith(") ended by signal 9; the worker cannot go on without it")
        assert two.process.wait(30) == 0


def test_a_rank_ends_with_the_first_one(tiny: ModelFiles) -> None:
    with leader(tiny) as two:
        rank = identity(int(two.hear("pid")))
        folder = Path(two.hear("folder"))
        assert has_ended(rank) is False
        assert folder.exists()
        two.process.kill()
    began_s = time.monotonic()
    while not has_ended(rank):
        assert time.monotonic() - began_s < 30, "the rank is still there"
        time.sleep(0.02)
    assert not folder.exists()


def test_a_rank_that_cannot_begin_says_why(tiny: ModelFiles) -> None:
    lost: queue.Queue[RankLostError] = queue.Queue()
    with transport.create("ucx") as owner:
        changed = replace(setup(tiny, "float32", owner.allocate(4096)), revision="another")
        with Ranks([changed], lost.put) as ranks:
            with pytest.raises(RankLostError, match=r"rank 1 of 2 failed: the files at .* have changed since"):
                ranks.join()
            assert "have changed since" in str(lost.get(timeout=10))
        assert not ranks.store.parent.exists()
