"""Steps that start and send off workers, over whoever does so."""

from __future__ import annotations

import pytest

from gateway.candidates import Role
from kvferry import errors
from kvferry.api.directory.v1 import directory_pb2
from kvferry.types import WorkerRole
from services.planner.online.config import PlannerConfig
from services.planner.online.decider import Grow, Shrink, Step
from services.planner.online.steps import carry_out
from services.planner.replicas import Replicas
from services.runtime.channels import Channels

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE


class Kept:
    def __init__(self, prefill: int, decode: int, *, refuses: bool = False) -> None:
        self.counts = {PREFILL: prefill, DECODE: decode}
        self.refuses = refuses

    async def count(self, role: WorkerRole) -> int:
        return self.counts[role]

    async def scale(self, role: WorkerRole, count: int) -> None:
        if self.refuses:
            raise errors.UnavailableError("not now")
        self.counts[role] = count


@pytest.mark.parametrize(
    ("step", "kept", "made", "then"),
    [
        (Grow(Role.DECODE), Kept(1, 1), True, (1, 2)),
        (Grow(Role.PREFILL), Kept(1, 2), False, (1, 2)),  # one is wanted that has not come yet
        (Shrink(Role.PREFILL), Kept(2, 1), True, (1, 1)),
        (Shrink(Role.PREFILL), Kept(2, 1, refuses=True), False, (2, 1)),
    ],
)
async def test_one_worker_more_or_fewer(step: Step, kept: Kept, made: bool, then: tuple[int, int]) -> None:
    replicas: Replicas = kept
    async with Channels(None) as channels:
        states = [directory_pb2.WorkerState()] * 2
        assert await carry_out(step, states, channels, replicas, 5.0) is made
    assert (kept.counts[PREFILL], kept.counts[DECODE]) == then


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"apply": True, "max_workers": 4}, "needs --supervisor"),
        ({"kubernetes_prefill": "p"}, "go together"),
        ({"kubernetes_prefill": "p", "kubernetes_decode": "d"}, "--no-change-roles"),
        ({"max_workers": 1}, "fewer than the 2"),
    ],
)
def test_what_cannot_be_is_refused_at_start(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PlannerConfig(**wrong)  # type: ignore[arg-type]
