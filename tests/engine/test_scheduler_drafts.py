"""The scheduler with drafts: more tokens a step, and the same ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Sequence_

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.blocks import OutOfBlocksError
from services.engine.lookup import Drafter
from services.engine.sampling_params import DrawFailed, Drawn, Sampling
from services.engine.scheduler import MOST_OPEN, NeverFitsError, Plan, Scheduler
from services.engine.sequence import Event, FinishReason, Sequence, SequenceId, Stage, StepFailed, TokenDrawn
from tests.engine.test_scheduler import BLOCK, ROOT, FakeModel, echo, expected, scheduler, sequence


class Repeat(Drafter):
    """Drafts what it was told to, whatever happens."""

    def __init__(self, drafts: Sequence_[int]) -> None:
        super().__init__()
        self._drafts = list(drafts)

    def propose(self, tokens: Sequence_[int], most: int) -> list[int]:
        return self._drafts[: max(most, 0)]


class Oracle(Drafter):
    """Knows the whole answer, or, spoilt, all of it but each third token."""

    def __init__(self, text: Sequence_[int], spoilt: bool = False) -> None:
        super().__init__()
        self._text = [t + (spoilt and i % 3 == 2) for i, t in enumerate(text)]

    def propose(self, tokens: Sequence_[int], most: int) -> list[int]:
        return self._text[len(tokens) : len(tokens) + max(most, 0)]


def decoding(s: Scheduler, model: FakeModel, name: str, prompt: list[int], max_tokens: int, drafter: Drafter,
             stop_ids: frozenset[int] = frozenset()) -> Sequence:  # fmt: skip
    """A sequence whose KV was delivered: its next step decodes."""
    made = Sequence(SequenceId(name), list(prompt), Sampling(), max_tokens, stop_ids, [ROOT], drafter=drafter)
    _, lent = s.reserve(made)
    table = made.block_table + lent
    for i, token in enumerate(prompt):
        model.slots[table[i // BLOCK] * BLOCK + i % BLOCK] = token
    s.deliver(made.id, lent, Drawn(echo(prompt)))
    return made


def planned(s: Scheduler) -> Plan:
    plan = s.plan()
    assert plan is not None
    return plan


def tokens_of(events: list[Event]) -> list[int]:
    return [e.drawn.token_id for e in events if isinstance(e, TokenDrawn)]


PROMPT = [1, 2, 0, 1, 1]


def test_accepted_drafts_come_in_one_step_one_event_each() -> None:
    s, model = scheduler(20, max_step_tokens=16), FakeModel(20, echo)
    answer = expected(PROMPT, 20, echo)
    q = decoding(s, model, "a", PROMPT, 20, Oracle(PROMPT + answer))
    plan = planned(s)
    assert (plan.counts, plan.num_draft_tokens, plan.num_decode_tokens) == ((1,), 15, 1)
    events = s.complete(plan, model.run(plan))
    assert tokens_of(events) == answer[1:17]
    assert [e.index for e in events if isinstance(e, TokenDrawn)] == list(range(1, 17))
    assert (q.num_drafted, q.num_accepted, q.num_to_compute) == (15, 15, 1)
    s.check_integrity()


def test_what_follows_a_refused_draft_does_not_count() -> None:
    s, model = scheduler(20, max_step_tokens=16), FakeModel(20, echo)
    answer = expected(PROMPT, 20, echo)
    q = decoding(s, model, "a", PROMPT, 20, Repeat([answer[1], answer[2], answer[3] + 1, answer[4]]))
    plan = planned(s)
    drawn = model.run(plan)
    assert tokens_of(s.complete(plan, drawn)) == answer[1:4]
    assert (q.num_drafted, q.num_accepted, q.num_to_compute) == (4, 2, 1)


@pytest.mark.parametrize("spoilt", [False, True])
def test_an_answer_ends_within_an_accepted_run(spoilt: bool) -> None:
    answer = expected(PROMPT, 40, echo)
    stop = answer[5]
    length = answer.index(stop) + 1
    for stop_ids, max_tokens, size, reason in (
        (frozenset({stop}), 40, length, FinishReason.STOP),
        (frozenset(), 8, 8, FinishReason.LENGTH),
        (frozenset(), 1000, 6 * BLOCK - len(PROMPT), FinishReason.LENGTH),
    ):
        s, model = scheduler(6, max_step_tokens=64), FakeModel(6, echo)
        decoding(s, model, "a", PROMPT, max_tokens, Oracle(PROMPT + answer, spoilt), stop_ids)
        events: list[TokenDrawn] = []
        while plan := s.plan():
            last = plan.entries[0].start + len(plan.entries[0].token_ids)
            assert last < min(len(PROMPT) + max_tokens, s.max_length), "nothing is drawn past the end"
            events += [e for e in s.complete(plan, model.run(plan)) if isinstance(e, TokenDrawn)]
            s.check_integrity()
        assert tokens_of(list(events)) == answer[1:size]
        assert [e.finish for e in events] == [None] * (size - 2) + [reason]
        assert s.pool.counts().active == 0


def test_blocks_of_refused_drafts_come_back_and_are_not_remembered() -> None:
    s, model = scheduler(20, max_step_tokens=16), FakeModel(20, echo)
    decoding(s, model, "a", PROMPT, 40, Repeat([9] * 12))
    before, known = s.pool.counts(), s.pool.hashes()
    plan = planned(s)
    assert s.pool.counts().active == before.active + 3
    s.complete(plan, model.run(plan))
    assert s.pool.counts() == before
    assert s.pool.hashes() == known
    s.check_integrity()


def test_drafts_take_no_block_that_another_counts_on() -> None:
    """Two that decode and one that waits: what they need next stays where it is."""
    s, model = scheduler(8, max_step_tokens=64), FakeModel(8, echo)
    for name in "ab":
        decoding(s, model, name, PROMPT, 20, Repeat([9] * 11))
    s.add(sequence("c", [1] * 13, 3))  # needs 4 blocks of 5, and 2 are kept for those that run
    plan = planned(s)
    assert [q.id for q in plan.sequences] == ["a", "b"]
    # Each has 8 slots, of which 6 hold tokens.
    assert [e.num_drafts for e in plan.entries] == [2, 2]
    assert s.pool.num_available == 5
    s.complete(plan, model.run(plan))


def test_a_step_has_no_more_rows_for_drafts_than_are_cheap() -> None:
    s, model = scheduler(60, max_step_tokens=64, max_draft_rows=12), FakeModel(60, echo)
    for name in "abcde":
        decoding(s, model, name, PROMPT, 20, Repeat([9] * 11))
    assert [e.num_drafts for e in planned(s).entries] == [2, 2, 1, 1, 1]


def test_no_drafts_beside_a_chunk_that_fills_the_step() -> None:
    s, model = scheduler(60, max_step_tokens=40, max_draft_rows=12), FakeModel(60, echo)
    decoding(s, model, "a", PROMPT, 20, Repeat([9] * 11))
    s.add(sequence("b", [1] * 30, 3))
    assert [e.num_drafts for e in planned(s).entries] == [0, 0]


def test_a_draw_that_fails_within_an_accepted_run_ends_it_there() -> None:
    s, model = scheduler(20, max_step_tokens=16), FakeModel(20, echo)
    answer = expected(PROMPT, 20, echo)
    decoding(s, model, "a", PROMPT, 20, Oracle(PROMPT + answer))
    plan = planned(s)
    drawn = model.run(plan)
    drawn[3] = DrawFailed("not finite")
    events = s.complete(plan, drawn)
    assert tokens_of(events) == answer[1:4]
    assert events[3:] == [StepFailed(SequenceId("a"), "not finite")]
    assert s.pool.counts().active == 0
    s.check_integrity()


class Interruptions(RuleBasedStateMachine):
    """Requests with and without drafts come, wait, are delivered, preempted, aborted, halted and failed, before a step and
    during it.  What is told of each is the beginning of what it would say alone."""

    @initialize(num_blocks=st.integers(6, 24), max_step_tokens=st.integers(1, 20), max_running=st.integers(1, 5))
    def open(self, num_blocks: int, max_step_tokens: int, max_running: int) -> None:
        self.scheduler = scheduler(num_blocks, max_step_tokens=max_step_tokens, max_running=max_running)
        self.model = FakeModel(num_blocks, echo)
        self.plans: deque[Plan] = deque()
        self.made: dict[str, Sequence] = {}
        self.answers: dict[str, list[int]] = {}
        self.told: dict[str, list[int]] = {}
        self.cut: set[str] = set()  # aborted, halted or failed: their answers may be short

    def make(self, prompt: list[int], max_tokens: int, guess: str, **kwargs: object) -> Sequence:
        name = str(len(self.made))
        self.answers[name] = answer = expected(prompt, max_tokens, echo)
        self.told[name] = []
        drafter = {
            "nothing": None,
            "lookup": Drafter(),
            "right": Oracle(prompt + answer),
            "nearly": Oracle(prompt + answer, spoilt=True),
            "wrong": Repeat([5] * 9),
        }[guess]
        self.made[name] = sequence(name, prompt, max_tokens, drafter=drafter, **kwargs)
        return self.made[name]

    PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=14)
    GUESSES = st.sampled_from(["nothing", "lookup", "right", "nearly", "wrong"])

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 30), guess=GUESSES, prefill_only=st.booleans())
    def add(self, prompt: list[int], max_tokens: int, guess: str, prefill_only: bool) -> None:
        q = self.make(prompt, max_tokens, guess, prefill_only=prefill_only)
        try:
            self.scheduler.add(q)
        except NeverFitsError:
            self.cut.add(q.id)

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 30), guess=GUESSES, writer_fails=st.booleans())
    def deliver(self, prompt: list[int], max_tokens: int, guess: str, writer_fails: bool) -> None:
        q = self.make(prompt, max_tokens, guess)
        try:
            _, lent = self.scheduler.reserve(q)
        except (OutOfBlocksError, NeverFitsError):
            self.cut.add(q.id)
            return
        table = q.block_table + lent
        if writer_fails:
            self.cut.add(q.id)
            self.scheduler.pool.quarantine(lent)
            self.scheduler.abort(q.id)
            self.scheduler.pool.restore(lent)
            return
        for i, token in enumerate(prompt):
            if i >= q.num_cached:
                self.model.slots[table[i // BLOCK] * BLOCK + i % BLOCK] = token
        self.hear(self.scheduler.deliver(q.id, lent, Drawn(echo(prompt))))

    @precondition(lambda self: self.made)
    @rule(pick=st.integers(0, 10**6), halt=st.booleans())
    def interrupt(self, pick: int, halt: bool) -> None:
        name = str(pick % len(self.made))
        q = self.scheduler.get(SequenceId(name))
        self.cut.add(name)
        if halt and q is not None and q.prefill_only:
            self.scheduler.halt(q.id)
        self.scheduler.abort(SequenceId(name))

    @precondition(lambda self: len(self.plans) < MOST_OPEN)
    @rule()
    def begin(self) -> None:
        if plan := self.scheduler.plan():
            self.plans.append(plan)

    @precondition(lambda self: self.plans)
    @rule(fails=st.integers(0, 9))
    def finish(self, fails: int) -> None:
        plan = self.plans.popleft()
        if fails == 0:
            self.cut |= {q.id for q in plan.sequences}
            self.hear(self.scheduler.fail(plan, "broken"))
            self.model.forget_draws()
            return
        assert sum(len(e.token_ids) for e in plan.entries) <= self.scheduler.limits.max_step_tokens
        self.hear(self.scheduler.complete(plan, self.model.run(plan)))

    def hear(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, TokenDrawn):
                told = self.told[event.id]
                assert event.index == len(told)
                told.append(event.drawn.token_id)

    @invariant()
    def blocks_add_up_and_nobody_has_spoken_otherwise(self) -> None:
        self.scheduler.check_integrity()
        for q in self.scheduler._sequences.values():
            if not self.plans:
                assert len(q.block_table) <= -(-len(q.tokens) // BLOCK), "blocks of drafts stayed behind"
        for name, told in self.told.items():
            assert told == self.answers[name][: len(told)]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.plans:
            self.finish(1)
        for name in self.cut:
            self.scheduler.abort(SequenceId(name))
        while self.scheduler.num_sequences:
            for q in self.made.values():
                if q.stage is Stage.HELD:  # its transfer has ended
                    self.scheduler.abort(q.id)
            self.begin()
            if self.plans:
                self.finish(1)
            self.blocks_add_up_and_nobody_has_spoken_otherwise()
        for name, q in self.made.items():
            if name not in self.cut:
                length = 1 if q.prefill_only else min(q.max_tokens, self.scheduler.max_length - q.num_prompt)
                assert len(self.told[name]) == length
        self.scheduler.check_integrity()
        assert self.scheduler.pool.counts().active == 0


Interruptions.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestInterruptions = Interruptions.TestCase
