"""The scheduler over a host tier: blocks that were evicted come back, and no token changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.blocks import BlockPool
from services.engine.host_tier import Copy, Direction, HostTier
from services.engine.sampling_params import Drawn
from services.engine.scheduler import Limits, Plan, Scheduler
from services.engine.sequence import Sequence, SequenceId, Stage, Started, TokenDrawn
from tests.engine.test_scheduler import BLOCK, FakeModel, expected, sequence


class Copies:
    """Between the model's slots and the host's.  A copy reads half of each block when it begins and half when it ends."""

    def __init__(self, s: Scheduler, model: FakeModel) -> None:
        self.fails: Callable[[Copy], bool] = lambda copy: False
        self.under_way: list[tuple[Copy, list[int | None]]] = []
        self.begun: list[Copy] = []
        self._s, self._model = s, model
        self._host: list[int | None] = [None] * (s.host.num_slots * BLOCK)

    def begin(self) -> None:
        self._s.take_cache_changes()
        for copy in self._s.host.take_copies():
            self.begun.append(copy)
            self.under_way.append((copy, self._read(copy)))

    def end(self, index: int = 0) -> None:
        copy, early = self.under_way.pop(index)
        tokens = [e if i % 2 else late for i, (e, late) in enumerate(zip(early, self._read(copy), strict=True))]
        fails = self.fails(copy)
        into = self._host if copy.direction is Direction.DOWN else self._model.slots
        for i, place in enumerate(copy.slots if copy.direction is Direction.DOWN else copy.blocks):
            into[place * BLOCK : (place + 1) * BLOCK] = [-1] * BLOCK if fails else tokens[i * BLOCK : (i + 1) * BLOCK]
        self._s.copied(copy, ok=not fails)

    def settle(self) -> None:
        self.begin()
        while self.under_way:
            self.end()
            self.begin()

    def _read(self, copy: Copy) -> list[int | None]:
        down = copy.direction is Direction.DOWN
        source, places = (self._model.slots, copy.blocks) if down else (self._host, copy.slots)
        return [t for place in places for t in source[place * BLOCK : (place + 1) * BLOCK]]


def with_host(num_blocks: int, num_slots: int, **limits: int) -> tuple[Scheduler, FakeModel, Copies]:
    pool = BlockPool(num_blocks)
    defaults = {"block_size": BLOCK, "context_length": 1000, "max_step_tokens": 7, "max_running": 8, "max_waiting": 50}
    s = Scheduler(pool, Limits(**{**defaults, **limits}), HostTier(pool, num_slots))
    model = FakeModel(num_blocks)
    return s, model, Copies(s, model)


def drawn(s: Scheduler, model: FakeModel, plan: Plan) -> dict[str, list[int]]:
    for entry in plan.entries:
        for position in range(entry.start, entry.start + len(entry.token_ids)):
            block = entry.block_table[position // BLOCK]
            assert s.pool.content(block) is None, "a step writes into a block that others may read"
    tokens: dict[str, list[int]] = {}
    for event in s.complete(plan, model.run(plan)):
        if isinstance(event, TokenDrawn):
            tokens.setdefault(event.id, []).append(event.drawn.token_id)
    return tokens


def answer(s: Scheduler, model: FakeModel, copies: Copies, q: Sequence) -> list[int]:
    s.add(q)
    tokens: list[int] = []
    while s.num_sequences:
        if plan := s.plan():
            tokens += drawn(s, model, plan).get(q.id, [])
        copies.settle()
        s.check_integrity()
    return tokens


def evicted(s: Scheduler, model: FakeModel, copies: Copies, prompt: list[int]) -> None:
    """Answers the prompt, and others until nothing of it is left in the pool."""
    answer(s, model, copies, sequence("before", prompt, 1))
    for i in range(100):
        if s.pool.find(sequence_hash(s, prompt)) is None:
            return
        answer(s, model, copies, sequence(f"other {i}", [500 + i] * (s.pool.num_blocks * BLOCK // 2), 1))
    raise AssertionError("the prompt stays in the pool")


def sequence_hash(s: Scheduler, prompt: list[int]) -> bytes:
    q = sequence("x", prompt, 1)
    s._extend_chain(q)
    return q.chain[1]


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 20), st.booleans()),
        min_size=1,
        max_size=14,
    ),
    st.integers(13, 30),
    st.integers(0, 60),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_no_token_changes_in_whatever_order_copies_begin_end_and_fail(
    requests: list[tuple[list[int], int, bool]],
    num_blocks: int,
    num_slots: int,
    max_running: int,
    ahead: bool,
    seed: int,
) -> None:
    """Some requests are aborted, at any moment."""
    rng = random.Random(seed)
    s, model, copies = with_host(num_blocks, num_slots, max_running=max_running)
    copies.fails = lambda copy: rng.random() < 0.2
    outputs: dict[str, list[int]] = {}
    to_come = [(str(i), *request) for i, request in enumerate(requests)]
    dropped: set[str] = set()
    plans: list[Plan] = []
    for _ in range(20_000):
        if to_come and rng.random() < 0.3:
            name, prompt, max_tokens, drop = to_come.pop()
            s.add(sequence(name, prompt, max_tokens))
            if drop:
                dropped.add(name)
        if len(plans) < 1 + ahead and (plan := s.plan()):
            plans.append(plan)
        elif plans:
            for name, tokens in drawn(s, model, plans.pop(0)).items():
                outputs.setdefault(name, []).extend(tokens)
        if rng.random() < 0.5:
            copies.begin()
        if copies.under_way and rng.random() < 0.5:
            copies.end(rng.randrange(len(copies.under_way)))
        if dropped and rng.random() < 0.05:
            s.abort(SequenceId(rng.choice(sorted(dropped))))
        s.take_cache_changes()
        s.check_integrity()
        if not (to_come or s.num_sequences or plans or copies.under_way):
            break
    else:
        raise AssertionError("the scheduler did not come to an end")
    for name, prompt, max_tokens, _ in [(str(i), *request) for i, request in enumerate(requests)]:
        whole = expected(prompt, max_tokens)
        if name in dropped:
            assert outputs.get(name, []) == whole[: len(outputs.get(name, []))]
        else:
            assert outputs[name] == whole
    counts = s.pool.counts()
    assert counts.free == counts.total - counts.cached


def test_what_was_evicted_comes_back_by_a_copy_and_is_not_computed() -> None:
    s, model, copies = with_host(10, 40)
    prompt = list(range(30))
    evicted(s, model, copies, prompt)
    computed = model.tokens_computed
    again = sequence("again", prompt, 3)
    assert answer(s, model, copies, again) == expected(prompt, 3)
    assert again.num_cached == 28
    assert model.tokens_computed - computed == 2 + 2
    assert s.host.totals.loaded == 7


def test_where_the_copy_fails_the_prompt_is_computed() -> None:
    s, model, copies = with_host(10, 40)
    prompt = list(range(30))
    evicted(s, model, copies, prompt)
    copies.fails = lambda copy: copy.direction is Direction.UP
    computed = model.tokens_computed
    again = sequence("again", prompt, 3)
    assert answer(s, model, copies, again) == expected(prompt, 3)
    assert again.num_cached == 0
    assert model.tokens_computed - computed == 30 + 2


@pytest.mark.parametrize("fails", [False, True])
def test_what_others_share_is_not_written_where_a_copy_before_it_fails(fails: bool) -> None:
    """Of a chain, the pool has kept a block in the middle, which a pin reads."""
    s, model, copies = with_host(10, 40)
    prompt = list(range(30))
    answer(s, model, copies, sequence("before", prompt, 1))
    q = sequence("x", prompt, 1)
    s._extend_chain(q)
    pinned = s.pool.match(q.chain[1:])[3]
    s.pool.acquire([pinned])
    i = 0
    while s.pool.find(q.chain[1]) is not None:
        i += 1
        s.add(sequence(f"other {i}", [500 + i] * 20, 1))
        while plan := s.plan():
            drawn(s, model, plan)
            copies.settle()
    assert s.pool.find(q.chain[4]) == pinned
    copies.fails = lambda copy: fails
    s.add(sequence("again", prompt, 3))
    tokens: list[int] = []
    while s.num_sequences:
        if plan := s.plan():
            tokens += drawn(s, model, plan).get("again", [])
        copies.settle()
        s.check_integrity({pinned: 1})
    assert tokens == expected(prompt, 3)


def test_nobody_waits_for_anothers_copy() -> None:
    s, model, copies = with_host(20, 80, max_running=2)
    prompt = list(range(30))
    evicted(s, model, copies, prompt)
    s.add(sequence("loads", prompt, 2))
    s.add(sequence("beside", [7, 8, 9], 2))
    plan = s.plan()
    assert plan is not None
    assert [q.id for q in plan.sequences] == ["beside"]
    assert [started.id for started in plan.started] == ["beside"]
    assert s.num_running == 2
    drawn(s, model, plan)
    s.add(sequence("third", [1, 2], 2))
    plan = s.plan()
    assert plan is not None
    assert [q.id for q in plan.sequences] == ["beside"], "the one that loads keeps its place"
    drawn(s, model, plan)
    copies.settle()
    plan = s.plan()
    assert plan is not None
    assert [(started.id, started.num_cached) for started in plan.started] == [("loads", 28), ("third", 0)]


def test_one_copy_serves_all_that_ask_for_it_at_once() -> None:
    s, model, copies = with_host(30, 120)
    prompt = list(range(30))
    evicted(s, model, copies, prompt)
    loaded = s.host.totals.loaded
    names = ("a", "b", "c")
    for name in names:
        s.add(sequence(name, prompt, 2))
    s.add(sequence("beside", [7, 8, 9], 1))
    plan = s.plan()
    assert plan is not None
    assert [started.id for started in plan.started] == ["beside"]
    drawn(s, model, plan)
    assert (s.num_waiting, s.num_running) == (2, 1)
    outputs: dict[str, list[int]] = {name: [] for name in names}
    num_cached = {}
    while s.num_sequences:
        if plan := s.plan():
            num_cached.update({started.id: started.num_cached for started in plan.started})
            for name, tokens in drawn(s, model, plan).items():
                outputs[name] += tokens
        copies.settle()
        s.check_integrity()
    assert outputs == {name: expected(prompt, 2) for name in names}
    assert num_cached == dict.fromkeys(names, 28)
    assert s.host.totals.loaded - loaded == 7


def test_blocks_that_a_copy_still_writes_into_are_given_to_nobody() -> None:
    s, model, copies = with_host(10, 40)
    prompt = list(range(30))
    evicted(s, model, copies, prompt)
    again = sequence("again", prompt, 3)
    s.add(again)
    assert s.plan() is None
    table = list(again.block_table)
    copies.begin()
    s.abort(again.id)
    assert s.pool.counts().active == 8
    assert not set(table) & set(s.pool.allocate(2))
    s.take_cache_changes()
    s.check_integrity({block: 1 for block in s.pool.references() if block not in table})
    copies.settle()
    assert s.pool.counts().active == 2
    assert s.num_sequences == 0


def test_a_halted_one_keeps_what_it_has() -> None:
    s, model, copies = with_host(10, 40)
    prompt = list(range(30))
    evicted(s, model, copies, prompt)
    again = sequence("again", prompt, 3, prefill_only=True)
    s.add(again)
    assert s.plan() is None
    s.halt(again.id)
    copies.settle()
    assert s.plan() is None
    assert (again.stage, s.pool.counts().active) == (Stage.HELD, 8)
    s.abort(again.id)
    assert (s.num_sequences, s.pool.counts().active) == (0, 0)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("arrives_first", [False, True])
def test_a_reservation_takes_what_the_host_has_and_lends_the_rest(fails: bool, arrives_first: bool) -> None:
    s, model, copies = with_host(10, 40)
    prompt = list(range(30))
    evicted(s, model, copies, prompt[:14])  # three full blocks
    q = sequence("q", prompt, 4)
    index, lent = s.reserve(q)
    assert (index, len(lent), q.num_cached) == (3, 5, 12)
    copies.fails = lambda copy: fails
    if arrives_first:
        copies.settle()
    for i, token in enumerate(prompt[12:]):
        model.slots[lent[i // BLOCK] * BLOCK + i % BLOCK] = token
    computed = model.tokens_computed
    first = expected(prompt, 1)[0]
    (event,) = s.deliver(q.id, lent, Drawn(first))
    assert isinstance(event, TokenDrawn)
    if not arrives_first:
        assert s.plan() is None
        copies.settle()
    tokens = [first]
    resumed: list[SequenceId] = []
    while plan := s.plan():
        assert plan.started == (), "it was told of by its ticket"
        resumed += [event.id for event in plan.resumed]
        new = drawn(s, model, plan).get(q.id, [])
        assert bool(resumed) == bool(new or tokens[1:]), "told with the step that its second token comes from"
        tokens += new
        copies.settle()
        s.check_integrity()
    assert tokens == expected(prompt, 4)
    assert model.tokens_computed - computed == 3 + 30 * fails
    assert s.num_sequences == 0


def test_a_preempted_sequence_comes_back_from_the_host() -> None:
    """Two that do not fit together: the younger makes room, its blocks are evicted, and it does not compute them again."""
    s, model, copies = with_host(12, 60)
    prompts = {"a": list(range(18)), "b": list(range(100, 118))}
    for name, prompt in prompts.items():
        s.add(sequence(name, prompt, 20))
    outputs: dict[str, list[int]] = {"a": [], "b": []}
    started: list[Started] = []
    while s.num_sequences:
        if plan := s.plan():
            started += plan.started
            for name, tokens in drawn(s, model, plan).items():
                outputs[name] += tokens
        copies.settle()
        s.check_integrity()
    assert outputs == {name: expected(prompt, 20) for name, prompt in prompts.items()}
    assert s.host.totals.loaded > 0
    assert model.tokens_computed < 2 * (18 + 20) + 2 * BLOCK


def test_an_older_sequence_does_not_give_way_to_one_that_loads() -> None:
    """The pool has no block left: the older one waits for the copy, and then the younger one makes room."""
    s, model, copies = with_host(8, 40)
    prompt = list(range(12))
    evicted(s, model, copies, prompt)
    older, younger = sequence("older", [50] * 14, 9), sequence("younger", prompt, 2)
    s.add(older)
    for _ in range(2):
        plan = s.plan()
        assert plan is not None
        drawn(s, model, plan)
    taken = s.pool.allocate(s.pool.num_available - 4)
    s.add(younger)
    plan = s.plan()
    assert plan is not None
    assert younger.is_loading
    taken += s.pool.allocate(s.pool.num_available)
    drawn(s, model, plan)
    drawn(s, model, s.plan() or plan)
    assert len(older.tokens) == 4 * BLOCK + 1
    assert s.plan() is None
    assert older.num_preemptions == 0
    copies.settle()
    plan = s.plan()
    assert plan is not None
    assert [q.id for q in plan.sequences] == ["older"]
    assert (older.num_preemptions, younger.stage) == (0, Stage.WAITING)
