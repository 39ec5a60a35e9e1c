"""Blocks of a pool on a GPU, to pinned memory and back."""

from __future__ import annotations

import pytest
import torch

from services.engine.cuda_copier import CudaCopier

pytestmark = pytest.mark.gpu

SHAPE = (8, 30, 2, 16, 3, 64)  # blocks of SmolLM2


def test_blocks_go_down_and_come_back(place: torch.device) -> None:
    arena = torch.randn(SHAPE, device=place).to(torch.bfloat16)
    before = arena.clone()
    copier = CudaCopier(arena, 6)
    copier.down([7, 0, 3], [5, 1, 0])
    arena.zero_()
    copier.up([1, 5, 0], [2, 6, 0])
    expected = torch.zeros_like(before)
    expected[[2, 6, 0]] = before[[0, 7, 3]]
    assert torch.equal(arena, expected)


def test_a_copy_waits_for_what_was_asked_of_the_device_before(place: torch.device) -> None:
    arena = torch.zeros(SHAPE, device=place)
    copier = CudaCopier(arena, 1)
    busy = torch.randn(4096, 4096, device=place)
    for _ in range(50):
        busy = busy @ busy / 64
    arena[3].fill_(7)
    copier.down([3], [0])
    for _ in range(50):
        busy = busy @ busy / 64
    seen = arena[3].clone()  # by a step that is still to run when the block is given to somebody else
    copier.up([0], [3])
    torch.cuda.synchronize(place)
    assert bool((seen == 7).all())
    assert bool((arena[3] == 7).all())
