"""Memory for conversions: no byte held twice, nobody forgotten, everything given back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.engine.layout import KvLayout
from services.prefill.scratch import Claim, Scratch, plan_goes
from tests.prefill.pools import layouts

NBYTES = 40


class ScratchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scratch = Scratch(NBYTES)
        self.claims: list[Claim] = []  # in the order in which they came
        self.bytes: list[Claim | None] = [None] * NBYTES  # who may write here

    @rule(nbytes=st.integers(1, NBYTES))
    def claim(self, nbytes: int) -> None:
        claim = self.scratch.claim(nbytes)
        self.claims.append(claim)
        if claim.offset is not None:
            self.hold(claim)

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if not self.claims:
            return
        claim = data.draw(st.sampled_from(self.claims))
        self.claims.remove(claim)
        self.bytes = [None if holder is claim else holder for holder in self.bytes]
        for served in self.scratch.give_back(claim):
            self.hold(served)

    def hold(self, claim: Claim) -> None:
        assert claim.offset is not None
        mine = slice(claim.offset, claim.offset + claim.nbytes)
        assert self.bytes[mine] == [None] * claim.nbytes, "two hold a byte"
        self.bytes[mine] = [claim] * claim.nbytes

    @invariant()
    def first_come_first_served(self) -> None:
        waits = [claim.offset is None for claim in self.claims]
        assert waits == sorted(waits), "a later claim was served before an earlier one"
        if not any(holder for holder in self.bytes):
            assert not self.claims, "all memory is free and somebody waits"

    @invariant()
    def adds_up(self) -> None:
        self.scratch.check_integrity()
        assert self.scratch.num_claims == len(self.claims)


TestScratch = ScratchMachine.TestCase
TestScratch.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_waiting_claim_that_gives_up_lets_the_next_go() -> None:
    scratch = Scratch(NBYTES)
    held = scratch.claim(30)
    large, small = scratch.claim(20), scratch.claim(10)
    assert (held.offset, large.offset, small.offset) == (0, None, None)
    assert scratch.give_back(large) == [small]
    assert small.offset == 30


@pytest.mark.parametrize("nbytes", [0, NBYTES + 1])
def test_what_can_never_be_served_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="cannot be claimed"):
        Scratch(NBYTES).claim(nbytes)


@settings(max_examples=300)
@given(target=layouts, nbytes=st.integers(1, 4096))
def test_a_go_fits_with_room_for_another_where_there_is_any(target: KvLayout, nbytes: int) -> None:
    if nbytes < target.token_nbytes:
        with pytest.raises(ValueError, match="hold no token"):
            plan_goes(target, nbytes)
        return
    layout, step = plan_goes(target, nbytes)
    assert (layout.dtype, layout.content_fingerprint) == (target.dtype, target.content_fingerprint)
    assert step > 0
    assert step % layout.block_size == 0
    go = step // layout.block_size * layout.block_nbytes
    assert go <= nbytes
    if nbytes >= target.block_nbytes:
        assert layout == target
    if nbytes >= 2 * target.block_nbytes:
        assert 2 * go <= nbytes
