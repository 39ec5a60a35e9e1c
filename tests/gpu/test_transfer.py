"""Pools on a GPU between two processes, and between a GPU and the host."""

from __future__ import annotations

import pytest

from tests.transport.exchange import exchange

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("place")]


def test_blocks_go_between_two_processes_on_one_gpu_by_cuda_ipc() -> None:
    """By TCP they would arrive as well, and nobody would notice."""
    ways = exchange(0, 0)
    for operation in ("write", "read"):
        taken = ways[operation, "cuda"]
        assert "cuda_ipc" in taken
        assert "tcp" not in taken


@pytest.mark.parametrize(("ours", "theirs"), [(0, None), (None, 0)], ids=["to a gpu", "from a gpu"])
def test_blocks_go_between_a_gpu_and_the_host(ours: int | None, theirs: int | None) -> None:
    exchange(ours, theirs)
