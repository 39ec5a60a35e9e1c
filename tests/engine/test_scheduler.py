"""The scheduler with a made-up model: every token depends on all tokens before it, read from made-up KV."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.blocks import BlockPool, OutOfBlocksError
from services.engine.hashing import chain_root
from services.engine.lookup import Drafter
from services.engine.sampling_params import DrawFailed, Drawn, Sampling
from services.engine.scheduler import Limits, NeverFitsError, Plan, QueueFullError, Scheduler
from services.engine.sequence import FinishReason, Sequence, SequenceId, StepFailed, TokenDrawn

BLOCK = 4
ROOT = chain_root("test")


def next_token(tokens: list[int]) -> int:
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 31 + len(tokens)) % 997


def echo(tokens: list[int]) -> int:
    """Mostly repeats itself, so that drafts are right now and then; still any token may change it."""
    mood = next_token(tokens)
    return tokens[-3] if len(tokens) > 3 and mood % 6 else mood // 6 % 5


class FakeModel:
    """Keeps, per slot of the pool, the token whose KV lies there; attention reads the tokens back from the slots."""

    def __init__(self, num_blocks: int, next_: Callable[[list[int]], int] = next_token) -> None:
        self.slots: list[int | None] = [None] * (num_blocks * BLOCK)
        self.tokens_computed = 0
        self._next = next_
        self._drawn: list[int] = []  # by the step before

    def run(self, plan: Plan) -> list[Drawn | DrawFailed | None]:
        """Draws for every place, those behind refused drafts too: the scheduler is to ignore them."""
        drawn: list[Drawn | DrawFailed | None] = []
        for entry in plan.entries:
            for i, token in enumerate(entry.token_ids):
                known = token if token >= 0 else self._drawn[-1 - token]
                self.slots[self._slot(entry.block_table, entry.start + i)] = known
            self.tokens_computed += len(entry.token_ids)
            last = entry.start + len(entry.token_ids)
            for end in range(last - entry.num_samples + 1, last + 1):
                context = [self.slots[self._slot(entry.block_table, i)] for i in range(end)]
                drawn.append(Drawn(self._next([t for t in context if t is not None])))
        self._drawn = [d.token_id for d in drawn if isinstance(d, Drawn)]
        return drawn

    def forget_draws(self) -> None:
        """The step failed: whoever computes on with its tokens computes something."""
        self._drawn = [0] * 100

    @staticmethod
    def _slot(table: object, position: int) -> int:
        return table[position // BLOCK] * BLOCK + position % BLOCK  # type: ignore[index]


def sequence(name: str, prompt: list[int], max_tokens: int, **kwargs: object) -> Sequence:
    return Sequence(SequenceId(name), list(prompt), Sampling(), max_tokens, frozenset(), [ROOT], **kwargs)  # type: ignore[arg-type]


def expected(prompt: list[int], max_tokens: int, next_: Callable[[list[int]], int] = next_token) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_(tokens))
    return tokens[len(prompt) :]


def scheduler(num_blocks: int, **limits: int) -> Scheduler:
    defaults = {"block_size": BLOCK, "context_length": 1000, "max_step_tokens": 7, "max_running": 8, "max_waiting": 50}
    return Scheduler(BlockPool(num_blocks), Limits(**{**defaults, **limits}))


def run_to_end(s: Scheduler, model: FakeModel, max_steps: int = 5000, ahead: bool = False) -> dict[str, list[int]]:
    """``ahead``: a step is planned before the one before it is completed, where the scheduler can."""
    outputs: dict[str, list[int]] = {}
    following: Plan | None = None
    for _ in range(max_steps):
        plan = following or s.plan()
        if plan is None:
            return outputs
        following = s.plan() if ahead else None
        assert sum(len(e.token_ids) for e in plan.entries) <= s.limits.max_step_tokens
        for event in s.complete(plan, model.run(plan)):
            if isinstance(event, TokenDrawn):
                assert event.index == len(outputs.setdefault(event.id, []))
                outputs[event.id].append(event.drawn.token_id)
        s.check_integrity()
    raise AssertionError("the scheduler did not come to an end")


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 20)), min_size=1, max_size=10
    ),
    st.integers(13, 40),
    st.integers(1, 9),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
)
def test_batching_caching_preemption_and_planning_ahead_change_no_token(
    requests: list[tuple[list[int], int]], num_blocks: int, max_step_tokens: int, max_mixed_tokens: int, ahead: bool,
    look_ahead: bool,
) -> None:  # fmt: skip
    s = scheduler(num_blocks, max_step_tokens=max_step_tokens, max_mixed_tokens=max_mixed_tokens, look_ahead=look_ahead)
    model = FakeModel(num_blocks)
    for i, (prompt, max_tokens) in enumerate(requests):
        s.add(sequence(str(i), prompt, max_tokens))
    outputs = run_to_end(s, model, ahead=ahead)
    assert outputs == {str(i): expected(p, n) for i, (p, n) in enumerate(requests)}
    counts = s.pool.counts()
    assert counts.free == counts.total - counts.cached


@pytest.mark.parametrize("look_ahead", [False, True])
def test_preemption_happens_and_changes_no_token(look_ahead: bool) -> None:
    s, model = scheduler(8, look_ahead=look_ahead), FakeModel(8)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    sequences = [sequence(str(i), p, 16) for i, p in enumerate(prompts)]
    for q in sequences:
        s.add(q)
    assert run_to_end(s, model) == {str(i): expected(p, 16) for i, p in enumerate(prompts)}
    assert sum(q.num_preemptions for q in sequences) > 0


def test_a_block_in_hand_comes_a_step_early_and_only_from_what_is_to_spare() -> None:
    for num_blocks, expected_blocks in ((8, 2), (2, 1)):
        s = scheduler(num_blocks, look_ahead=True)
        q = sequence("a", [1, 2, 3], 3)
        s.add(q)
        for num_tokens in (3, 4):
            plan = s.plan()
            assert plan is not None
            assert len(q.tokens) == num_tokens
            s.complete(plan, FakeModel(num_blocks).run(plan))
        assert len(q.block_table) == expected_blocks


def test_a_cached_prefix_is_not_computed_again() -> None:
    s, model = scheduler(40), FakeModel(40)
    prompt = list(range(21))
    s.add(sequence("first", prompt, 3))
    run_to_end(s, model)
    computed = model.tokens_computed
    again = sequence("again", prompt, 3)
    s.add(again)
    assert run_to_end(s, model)["again"] == expected(prompt, 3)
    assert again.num_cached == 20
    assert model.tokens_computed - computed == 1 + 2


def test_a_wholly_cached_prompt_still_computes_what_its_first_token_is_drawn_from() -> None:
    s, model = scheduler(40), FakeModel(40)
    prompt = list(range(8))
    s.add(sequence("first", prompt, 9))
    run_to_end(s, model)
    s.add(sequence("again", prompt, 5))
    assert run_to_end(s, model)["again"] == expected(prompt, 5)


def test_salted_chains_share_nothing() -> None:
    s, model = scheduler(40), FakeModel(40)
    s.add(sequence("one", list(range(9)), 1))
    run_to_end(s, model)
    other = Sequence(SequenceId("two"), list(range(9)), Sampling(), 1, frozenset(), [chain_root("test", b"tenant")])
    s.add(other)
    run_to_end(s, model)
    assert other.num_cached == 0


def test_delivered_kv_decodes_as_if_computed_here() -> None:
    prefill, decode = scheduler(20), scheduler(20)
    prefill_model, decode_model = FakeModel(20), FakeModel(20)
    prompt = [random.Random(1).randrange(900) for _ in range(18)]
    source = sequence("p", prompt, 1, prefill_only=True)
    prefill.add(source)
    first = run_to_end(prefill, prefill_model)["p"]
    target = sequence("d", prompt, 10)
    index, lent = decode.reserve(target)
    assert index == 0
    assert decode.pool.counts().lent == len(lent) == 5
    for here, there in zip(source.block_table, lent, strict=True):
        decode_model.slots[there * BLOCK : (there + 1) * BLOCK] = prefill_model.slots[here * BLOCK : (here + 1) * BLOCK]
    events = decode.deliver(target.id, lent, Drawn(first[0]))
    assert [e.index for e in events if isinstance(e, TokenDrawn)] == [0]
    rest: list[int] = []
    resumed: list[SequenceId] = []
    while plan := decode.plan():
        resumed += [event.id for event in plan.resumed]
        rest += [e.drawn.token_id for e in decode.complete(plan, decode_model.run(plan)) if isinstance(e, TokenDrawn)]
    assert first + rest == expected(prompt, 10)
    assert resumed == [target.id]
    assert prefill.pool.counts().active == 5, "the source is held until its transfer has ended"
    prefill.abort(source.id)
    prefill.check_integrity()
    assert prefill.pool.counts().active == 0


def test_reserving_skips_what_is_cached_and_gives_everything_back() -> None:
    s, model = scheduler(20), FakeModel(20)
    prompt = list(range(10))
    s.add(sequence("first", prompt, 1))
    run_to_end(s, model)
    index, lent = s.reserve(sequence("second", prompt, 4))
    assert (index, len(lent)) == (2, 1)
    s.pool.quarantine(lent)
    s.abort(SequenceId("second"))
    s.pool.restore(lent)
    s.check_integrity()
    assert s.pool.counts().active == 0


def test_reserving_more_than_there_is_takes_nothing() -> None:
    s = scheduler(4)
    s.reserve(sequence("a", list(range(9)), 1))
    before = s.pool.counts()
    with pytest.raises(OutOfBlocksError):
        s.reserve(sequence("b", list(range(9)), 1))
    assert s.pool.counts() == before


def test_reservations_do_not_starve_those_who_run_or_wait() -> None:
    """A closed loop of clients that reserve as soon as there is room, on a pool too small for all of them."""
    s, model = scheduler(24, max_step_tokens=64), FakeModel(24)
    refused: list[int] = []
    started = 0
    last_progress: dict[str, int] = {}
    longest_silence = 0
    for step in range(1500):
        while s.num_sequences < 12:
            q = sequence(f"q{started}", [started % 7 + 1] * 2 + list(range(14)), 12)
            try:
                _, lent = s.reserve(q)
            except OutOfBlocksError:
                refused.append(step)
                break
            started += 1
            for i, token in enumerate(q.tokens):
                table = q.block_table + lent
                model.slots[table[i // BLOCK] * BLOCK + i % BLOCK] = token
            s.deliver(q.id, lent, Drawn(next_token(q.tokens)))
            last_progress[q.id] = step
        plan = s.plan()
        assert plan is not None
        for event in s.complete(plan, model.run(plan)):
            if isinstance(event, TokenDrawn):
                last_progress[event.id] = step
                if event.finish:
                    del last_progress[event.id]
        longest_silence = max([longest_silence, *(step - seen for seen in last_progress.values())])
    assert refused, "the pool was tight"
    assert started > 300
    assert longest_silence < 60


def reserved(s: Scheduler, num_blocks: int) -> bool:
    """Whether room was found for a stranger's prompt of so many blocks; it is given back."""
    q = sequence("stranger", [9] * (num_blocks * BLOCK - 1), 1)
    try:
        _, lent = s.reserve(q)
    except OutOfBlocksError:
        return False
    s.pool.quarantine(lent)
    s.abort(q.id)
    s.pool.restore(lent)
    return True


def test_a_reservation_leaves_a_block_for_each_that_grows_those_that_arrive_yet_among_them() -> None:
    s, model = scheduler(12, max_step_tokens=64), FakeModel(12)
    assert reserved(s, 12)
    s.reserve(sequence("arrives", [1] * BLOCK, 20))
    assert [reserved(s, num) for num in (10, 11)] == [True, False]
    s.add(sequence("runs", [2] * BLOCK, 20))
    plan = s.plan()
    assert plan is not None
    s.complete(plan, model.run(plan))
    free = s.pool.num_available
    assert [reserved(s, num) for num in (free - 2, free - 1)] == [True, False]


def test_a_reservation_leaves_what_the_first_in_the_queue_needs_where_there_is_a_place_for_it() -> None:
    for max_running, may in ((1, True), (2, False)):
        s, model = scheduler(12, max_running=max_running, max_step_tokens=64), FakeModel(12)
        s.add(sequence("runs", [1] * (4 * BLOCK), 40))
        plan = s.plan()
        assert plan is not None
        s.complete(plan, model.run(plan))
        s.add(sequence("waits", [2] * (5 * BLOCK), 1))
        assert reserved(s, s.pool.num_available - 1 - 5)
        assert reserved(s, s.pool.num_available - 1) is may


def test_whoever_starts_leaves_a_block_for_each_that_runs() -> None:
    for num_blocks, starts in ((6, False), (7, True)):
        s, model = scheduler(num_blocks, max_step_tokens=64), FakeModel(num_blocks)
        s.add(sequence("runs", [1] * (2 * BLOCK), 5))
        plan = s.plan()
        assert plan is not None
        s.complete(plan, model.run(plan))
        s.add(sequence("waits", [2] * (3 * BLOCK), 1))
        plan = s.plan()  # whoever runs takes its third block first
        assert plan is not None
        assert (len(plan.sequences) == 2) is starts


def test_a_prompt_that_is_written_elsewhere_is_preempted_for_nobody() -> None:
    """Its first chunks are read by a transfer already."""
    s, model = scheduler(7, max_step_tokens=4 * BLOCK), FakeModel(7)
    grows = sequence("grows", [1] * (2 * BLOCK), 9)
    s.add(grows)
    while len(grows.tokens) < 3 * BLOCK - 1:
        plan = s.plan()
        assert plan is not None
        s.complete(plan, model.run(plan))
    written = sequence("written", [2] * (3 * BLOCK), 1, prefill_only=True)
    s.add(written)
    s.limits = replace(s.limits, max_step_tokens=BLOCK)  # so that it takes several steps
    table: list[int] = []
    while written.num_output == 0:
        plan = s.plan()
        assert plan is not None
        s.complete(plan, model.run(plan))
        assert written.block_table[: len(table)] == table
        table = list(written.block_table)
        if len(s.pool.lent_blocks()) == 0 and s.pool.num_available:
            s.pool.lend(s.pool.num_available)  # nothing is left to grow into
    assert grows.num_preemptions > 0
    assert written.num_preemptions == 0


def test_an_abort_during_a_step_keeps_the_blocks_until_its_end() -> None:
    s, model = scheduler(20), FakeModel(20)
    s.add(sequence("a", [1, 2, 3], 5))
    plan = s.plan()
    assert plan is not None
    s.abort(SequenceId("a"))
    assert s.pool.counts().active == 1, "the step in flight writes there"
    assert not [e for e in s.complete(plan, model.run(plan)) if isinstance(e, TokenDrawn)]
    assert s.pool.counts().active == 0
    assert s.plan() is None


def test_a_halted_prefill_keeps_its_blocks_and_computes_no_more() -> None:
    s, model = scheduler(20, max_step_tokens=4), FakeModel(20)
    s.add(sequence("a", list(range(12)), 1, prefill_only=True))
    plan = s.plan()
    assert plan is not None
    s.halt(SequenceId("a"))
    s.complete(plan, model.run(plan))
    assert s.plan() is None
    assert s.pool.counts().active == 3
    s.abort(SequenceId("a"))
    s.check_integrity()
    assert s.pool.counts().active == 0


def test_a_failed_step_ends_its_own_sequences_and_no_other_that_started_with_it() -> None:
    s, model = scheduler(40, max_step_tokens=8), FakeModel(40)
    s.add(sequence("first", list(range(20)), 1, prefill_only=True))
    s.add(sequence("second", list(range(20, 40)), 1, prefill_only=True))
    plan = s.plan()
    assert plan is not None
    assert [q.id for q in plan.sequences] == ["first"]
    assert [started.id for started in plan.started] == ["first", "second"]
    assert [type(e).__name__ + " " + e.id for e in s.fail(plan, "broken")] == ["StepFailed first"]
    assert "second" in run_to_end(s, model)


def test_with_one_place_a_preemption_hands_it_on() -> None:
    s, model = scheduler(4, max_running=1), FakeModel(4)
    for name in ("a", "b"):
        q = sequence(name, [1, 2, 3], 12)
        _, lent = s.reserve(q)
        model.slots[lent[0] * BLOCK : lent[0] * BLOCK + 3] = q.tokens
        s.deliver(q.id, lent, Drawn(next_token(q.tokens)))
    outputs = {name: [next_token([1, 2, 3])] for name in ("a", "b")}
    while plan := s.plan():
        for event in s.complete(plan, model.run(plan)):
            if isinstance(event, TokenDrawn):
                outputs[event.id].append(event.drawn.token_id)
        s.check_integrity()
    assert outputs == {name: expected([1, 2, 3], 12) for name in ("a", "b")}


def test_whoever_takes_a_preempted_ones_place_gets_the_block_it_needs() -> None:
    """Its prompt fills its blocks, so its second token needs another."""
    s, model = scheduler(4, max_running=1), FakeModel(4)
    for name, first in (("a", 1), ("b", 5)):
        q = sequence(name, [first, 2, 3, 4], 8)
        _, lent = s.reserve(q)
        model.slots[lent[0] * BLOCK : lent[0] * BLOCK + 4] = q.tokens
        s.deliver(q.id, lent, Drawn(next_token(q.tokens)))
    s.pool.allocate(1)
    while plan := s.plan():
        s.complete(plan, model.run(plan))
    assert s.num_sequences == 0


def test_a_failed_step_ends_its_sequences_only() -> None:
    s = scheduler(20, max_running=1)
    s.add(sequence("a", [1, 2], 5))
    s.add(sequence("b", [1, 2], 5))
    plan = s.plan()
    assert plan is not None
    assert s.fail(plan, "broken")[-1] == StepFailed(SequenceId("a"), "broken")
    assert set(run_to_end(s, FakeModel(20))) == {"b"}


def test_a_draw_that_fails_ends_its_own_sequence_only() -> None:
    s, model = scheduler(20), FakeModel(20)
    s.add(sequence("sick", [1, 2], 5))
    s.add(sequence("well", [3, 4], 2))
    plan = s.plan()
    assert plan is not None
    _, well = model.run(plan)
    events = s.complete(plan, [DrawFailed("not finite"), well])
    assert [e for e in events if isinstance(e, StepFailed)] == [StepFailed(SequenceId("sick"), "not finite")]
    assert s.get(SequenceId("sick")) is None
    plan = s.plan()
    assert plan is not None
    assert [q.id for q in plan.sequences] == ["well"]


def test_a_running_stream_waits_for_one_chunk_at_most() -> None:
    s, model = scheduler(100, max_step_tokens=8), FakeModel(100)
    s.add(sequence("stream", [1], 50))
    plan = s.plan()
    assert plan is not None
    s.complete(plan, model.run(plan))
    s.add(sequence("long", list(range(200)), 1))
    for _ in range(20):
        plan = s.plan()
        assert plan is not None
        assert "stream" in {q.id for q in plan.sequences}
        s.complete(plan, model.run(plan))


def test_a_stream_that_came_later_is_not_held_up_by_an_older_prompt() -> None:
    s, model = scheduler(100, max_step_tokens=8), FakeModel(100)
    s.add(sequence("long", list(range(200)), 1))
    plan = s.plan()
    assert plan is not None
    s.complete(plan, model.run(plan))
    s.add(sequence("stream", [1], 50))
    for _ in range(20):
        plan = s.plan()
        assert plan is not None
        assert {q.id for q in plan.sequences} == {"stream", "long"}
        s.complete(plan, model.run(plan))


def test_prompts_take_smaller_chunks_while_others_decode() -> None:
    """Of two prompts the sum; the last token of a prompt is no token that somebody waits for."""
    s, model = scheduler(100, max_step_tokens=8, max_mixed_tokens=3), FakeModel(100)
    s.add(sequence("long", list(range(17)), 1))
    s.add(sequence("short", list(range(40, 45)), 3))
    s.add(sequence("last", list(range(60, 80)), 1))
    steps = []
    while (plan := s.plan()) is not None:
        steps.append({str(q.id): n for q, n in zip(plan.sequences, plan.counts, strict=True)})
        s.complete(plan, model.run(plan))
    assert steps == [
        {"long": 8},
        {"long": 8},
        {"long": 1, "short": 5, "last": 2},
        {"short": 1, "last": 3},
        {"short": 1, "last": 3},
        {"last": 8},
        {"last": 4},
    ]


def test_bounds_are_refusals() -> None:
    s = scheduler(4, max_waiting=1)
    with pytest.raises(NeverFitsError, match="16 tokens"):
        s.add(sequence("long", [1] * 16, 1))
    s.add(sequence("a", [1], 1))
    with pytest.raises(QueueFullError):
        s.add(sequence("b", [1], 1))


def test_the_answer_ends_at_stop_tokens_max_tokens_and_the_pool() -> None:
    prompt = [3, 1, 4]
    tokens = expected(prompt, 20)
    for stop, max_tokens, length, reason in (
        (frozenset({tokens[4]}), 20, tokens.index(tokens[4]) + 1, FinishReason.STOP),
        (frozenset(), 6, 6, FinishReason.LENGTH),
        (frozenset(), 1000, 16 - 3, FinishReason.LENGTH),
    ):
        s, model = scheduler(4), FakeModel(4)
        s.add(Sequence(SequenceId("a"), list(prompt), Sampling(), max_tokens, stop, [ROOT]))
        events = []
        while plan := s.plan():
            events += [e for e in s.complete(plan, model.run(plan)) if isinstance(e, TokenDrawn)]
        assert len(events) == length
        assert [e.finish for e in events] == [None] * (length - 1) + [reason]


def test_the_longest_answer_ends_beside_pins_that_never_do() -> None:
    """Pins hold all that they may, for ever: what remains is enough for the longest sequence accepted."""
    s, model = scheduler(8, max_pinned=2), FakeModel(8)
    pinned = s.pool.allocate(2)
    assert s.max_length == 6 * BLOCK
    s.add(sequence("a", [1, 2, 3], 1000))
    s.add(sequence("b", [4, 5, 6], 1000))
    while plan := s.plan():
        s.complete(plan, model.run(plan))
        s.check_integrity(dict.fromkeys(pinned, 1))
    assert s.num_sequences == 0
    with pytest.raises(AssertionError, match="and pins"):
        s.check_integrity()


def planned(s: Scheduler) -> Plan:
    plan = s.plan()
    assert plan is not None
    return plan


def test_a_step_is_planned_with_the_tokens_that_the_one_before_it_draws() -> None:
    s, model = scheduler(20), FakeModel(20)
    s.add(sequence("a", [1, 2, 3], 9))
    s.add(sequence("b", [4, 5], 9))
    first, second = planned(s), planned(s)
    assert [e.token_ids for e in first.entries] == [[1, 2, 3], [4, 5]]
    assert [(e.token_ids, e.start) for e in second.entries] == [([-1], 3), ([-2], 2)]
    assert (first.num_decode_tokens, second.num_decode_tokens) == (0, 2)
    s.complete(first, model.run(first))
    third = planned(s)
    assert [e.start for e in third.entries] == [4, 3]
    events = s.complete(second, model.run(second)) + s.complete(third, model.run(third))
    assert [e.drawn.token_id for e in events if isinstance(e, TokenDrawn) and e.id == "a"] == expected([1, 2, 3], 3)[1:]
    assert [e.drawn.token_id for e in events if isinstance(e, TokenDrawn) and e.id == "b"] == expected([4, 5], 3)[1:]


def test_what_a_stop_token_ends_keeps_its_blocks_while_a_step_still_computes_it() -> None:
    answer = expected([1, 2, 3], 3)
    s, model = scheduler(20), FakeModel(20)
    s.add(Sequence(SequenceId("a"), [1, 2, 3], Sampling(), 9, frozenset({answer[0]}), [ROOT]))
    first, second = planned(s), planned(s)
    events = s.complete(first, model.run(first))
    assert [e.finish for e in events if isinstance(e, TokenDrawn)] == [FinishReason.STOP]
    assert s.pool.counts().active == 1, "the step in flight writes there"
    assert s.plan() is None
    assert s.complete(second, model.run(second)) == []
    assert (s.pool.counts().active, s.num_sequences) == (0, 0)
    s.check_integrity()


def test_a_step_that_fails_says_nothing_of_what_had_ended_before_it() -> None:
    answer = expected([1, 2, 3], 1)
    s, model = scheduler(20), FakeModel(20)
    s.add(Sequence(SequenceId("a"), [1, 2, 3], Sampling(), 9, frozenset(answer), [ROOT]))
    first, second = planned(s), planned(s)
    s.complete(first, model.run(first))
    assert s.fail(second, "broken") == []
    assert (s.pool.counts().active, s.num_sequences) == (0, 0)


def test_nothing_is_computed_behind_a_token_that_is_known_to_be_the_last() -> None:
    s = scheduler(20)
    s.add(sequence("a", [1, 2, 3], 1))
    s.add(sequence("b", [4], 9, prefill_only=True))
    planned(s)
    assert s.plan() is None
    full = scheduler(1)
    full.add(sequence("a", [1, 2, 3], 9))
    planned(full)
    assert full.plan() is None, "the pool holds no token more"


def test_without_blocks_the_next_step_waits_for_the_one_under_way() -> None:
    s, model = scheduler(3), FakeModel(3)
    s.add(sequence("a", [1, 2, 3, 4], 3))
    s.add(sequence("b", [5, 6, 7], 2))
    first = planned(s)
    assert [q.id for q in first.sequences] == ["a", "b"]
    s.pool.allocate(1)
    assert s.plan() is None
    s.complete(first, model.run(first))
    again = planned(s)
    assert [q.id for q in again.sequences] == ["a"], "b was preempted for it"


def test_what_to_guess_waits_for_the_token_under_way() -> None:
    s, model = scheduler(20), FakeModel(20)
    s.add(sequence("a", [1, 2, 3], 9, drafter=Drafter()))
    first = planned(s)
    assert s.plan() is None
    s.complete(first, model.run(first))
    assert s.plan() is not None


def test_a_step_that_fails_takes_its_sequences_out_of_the_next() -> None:
    s, model = scheduler(20, max_step_tokens=5), FakeModel(20)
    s.add(sequence("a", [1, 2, 3], 9))
    first = planned(s)
    s.add(sequence("b", [4, 5], 1))
    second = planned(s)
    assert s.fail(first, "broken") == [StepFailed(SequenceId("a"), "broken")]
    model.forget_draws()
    events = s.complete(second, model.run(second))
    assert [(e.id, e.drawn.token_id) for e in events if isinstance(e, TokenDrawn)] == [("b", expected([4, 5], 1)[0])]
    assert s.num_sequences == 0
    s.check_integrity()
