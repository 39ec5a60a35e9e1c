"""Whatever there is of transfers, growing answers, preemption and pins, on pools however small: everybody comes to an end.

Two schedulers as on a prefill and a decode worker, with their tickets, and readers whose pins never end.  A transfer is
made when the prompt has been computed, and some writers give up; whom the decode worker refuses asks again.  There is no
time: when nobody can do anything and somebody is not done, that is a deadlock, and the test says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.blocks import OutOfBlocksError
from services.engine.growth import Growing, peak_growth
from services.engine.sampling_params import Drawn
from services.engine.scheduler import NeverFitsError, Plan, QueueFullError, Scheduler
from services.engine.sequence import Sequence, SequenceId, Stage, TokenDrawn
from tests.engine.test_scheduler import BLOCK, FakeModel, expected, scheduler, sequence

MAX_ROUNDS = 3000


@dataclass(slots=True)
class Side:
    scheduler: Scheduler
    model: FakeModel
    pinned: Counter[int] = field(default_factory=Counter)
    planned: list[Plan] = field(default_factory=list)

    def step(self, ahead: bool) -> list[TokenDrawn] | None:
        """None: there was nothing to compute."""
        if not self.planned:
            plan = self.scheduler.plan()
            if plan is None:
                return None
            self.planned.append(plan)
        if ahead and (plan := self.scheduler.plan()) is not None:
            self.planned.append(plan)
        plan = self.planned.pop(0)
        events = self.scheduler.complete(plan, self.model.run(plan))
        return [event for event in events if isinstance(event, TokenDrawn)]

    def pin_some(self) -> None:
        """For ever; as many as may be pinned, and only what is cached."""
        pool = self.scheduler.pool
        for block in range(pool.num_blocks):
            if len(self.pinned) < self.scheduler.limits.max_pinned and pool.content(block) and not self.pinned[block]:
                pool.acquire([block])
                self.pinned[block] += 1
        self.pinned += Counter()  # without zeros

    def check(self) -> None:
        self.scheduler.check_integrity(dict(self.pinned))


@dataclass(slots=True)
class Request:
    name: str
    prompt: list[int]
    max_tokens: int
    is_split: bool
    gives_up: bool  # its writer, the first time
    attempt: int = 0
    source: Sequence | None = None
    target: Sequence | None = None
    lent: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    is_done: bool = False


class Cluster:
    def __init__(self, prefill: Side, decode: Side, requests: list[Request]) -> None:
        self.prefill, self.decode, self.requests = prefill, decode, requests
        self.num_refused = 0

    def ask(self, request: Request) -> bool:
        """False: refused."""
        request.attempt += 1
        request.answer = []
        target = sequence(f"{request.name}/{request.attempt}", request.prompt, request.max_tokens)
        try:
            if not request.is_split:
                self.decode.scheduler.add(target)
            else:
                _, request.lent = self.decode.scheduler.reserve(target)
        except (OutOfBlocksError, QueueFullError):
            self.num_refused += 1
            return False
        request.target = target
        if request.is_split:
            request.source = sequence(f"{target.id}>", request.prompt, 1, prefill_only=True)
            self.prefill.scheduler.add(request.source)
        return True

    def drawn(self, event: TokenDrawn) -> None:
        request = next(r for r in self.requests if r.target is not None and r.target.id == event.id)
        assert event.index == len(request.answer)
        request.answer.append(event.drawn.token_id)
        request.is_done = event.finish is not None

    def transfer(self, request: Request) -> bool:
        """Once the prompt has been computed.  False: not yet."""
        source, target = request.source, request.target
        if source is None or target is None or source.stage is not Stage.HELD:
            return False
        pool = self.decode.scheduler.pool
        if request.gives_up:
            request.gives_up = False
            pool.quarantine(request.lent)
            self.decode.scheduler.abort(target.id)
            self.prefill.scheduler.abort(source.id)
            pool.restore(request.lent)
            request.source = request.target = None
            return True
        table = target.block_table + request.lent
        for here, there in zip(source.block_table[len(target.block_table) :], request.lent, strict=True):
            slots = slice(here * BLOCK, (here + 1) * BLOCK)
            self.decode.model.slots[there * BLOCK : (there + 1) * BLOCK] = self.prefill.model.slots[slots]
        assert len(table) == -(-len(request.prompt) // BLOCK)
        first = source.tokens[-1]
        request.source = None
        for event in self.decode.scheduler.deliver(target.id, request.lent, Drawn(first)):
            assert isinstance(event, TokenDrawn)
            self.drawn(event)
        self.prefill.scheduler.abort(source.id)
        return True

    def round(self, ahead: bool) -> bool:
        """False: nobody could do anything."""
        moved = False
        for request in self.requests:
            if request.target is None:
                moved |= self.ask(request)
            elif request.source is not None:
                moved |= self.transfer(request)
        moved |= self.prefill.step(ahead) is not None
        drawn = self.decode.step(ahead)
        for event in drawn or ():
            self.drawn(event)
        moved |= drawn is not None
        for side in (self.prefill, self.decode):
            side.pin_some()
            side.check()
        return moved


asked = st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=24), st.integers(1, 20), st.booleans(), st.booleans()
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(asked, min_size=1, max_size=10), st.integers(0, 8), st.integers(0, 14), st.integers(0, 3), st.integers(1, 8),
    st.lists(st.booleans(), min_size=1, max_size=7), st.booleans(),
)  # fmt: skip
def test_every_request_ends_with_its_tokens(
    asks: list[tuple[list[int], int, bool, bool]], spare_prefill: int, spare_decode: int, max_pinned: int,
    max_running: int, aheads: list[bool], look_ahead: bool,
) -> None:  # fmt: skip
    longest = max(-(-(len(prompt) + max_tokens) // BLOCK) for prompt, max_tokens, _, _ in asks)

    def side(spare: int) -> Side:
        num_blocks = longest + max_pinned + spare
        return Side(
            scheduler(num_blocks, max_pinned=max_pinned, max_running=max_running, look_ahead=look_ahead),
            FakeModel(num_blocks),
        )

    requests = [Request(str(i), *ask) for i, ask in enumerate(asks)]
    cluster = Cluster(side(spare_prefill), side(spare_decode), requests)
    for number in range(MAX_ROUNDS):
        if all(request.is_done for request in requests):
            break
        assert cluster.round(aheads[number % len(aheads)]), f"deadlock: {[r for r in requests if not r.is_done]}"
    assert all(request.is_done for request in requests), "some are starved"
    assert [r.answer for r in requests] == [expected(r.prompt, r.max_tokens) for r in requests]
    for each in (cluster.prefill, cluster.decode):
        while each.planned:  # computed once too often
            each.step(ahead=False)
        each.check()
        counts = each.scheduler.pool.counts()
        assert each.scheduler.num_sequences == 0
        assert counts.active == len(each.pinned)
        assert not counts.lent
        assert not counts.quarantined


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 20)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(0, 8), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_whoever_was_taken_ends_however_many_reservations_come(
    asks: list[tuple[int, int]], strangers: list[tuple[int, int]], spare: int, max_running: int, look_ahead: bool
) -> None:
    """Without end, and always before anybody else could have the blocks; each for a writer that gives up some steps
    later."""
    num_blocks = spare + max(-(-(num_prompt + max_tokens) // BLOCK) for num_prompt, max_tokens in asks)
    side = Side(scheduler(num_blocks, max_running=max_running, look_ahead=look_ahead), FakeModel(num_blocks))
    pool = side.scheduler.pool
    answers: dict[str, int] = {}
    for number, (num_prompt, max_tokens) in enumerate(asks):
        side.scheduler.add(sequence(f"{number}", [number] * num_prompt, max_tokens))
    held: dict[int, tuple[Sequence, list[int]]] = {}  # by the stranger
    until: dict[int, int] = {}
    num_strangers = 0
    for step in range(MAX_ROUNDS):
        if len(answers) == len(asks):
            break
        for stranger in [s for s, end in until.items() if end <= step]:
            reserved, lent = held.pop(stranger)
            del until[stranger]
            pool.quarantine(lent)
            side.scheduler.abort(reserved.id)
            pool.restore(lent)
        for _ in range(num_blocks):
            num_prompt, num_steps = strangers[num_strangers % len(strangers)]
            reserved = sequence(f"stranger {num_strangers}", [100 + num_strangers] * num_prompt, 1)
            num_strangers += 1
            try:
                _, lent = side.scheduler.reserve(reserved)
            except (OutOfBlocksError, NeverFitsError):
                continue
            held[num_strangers], until[num_strangers] = (reserved, lent), step + num_steps
        for event in side.step(ahead=False) or ():
            if event.finish is not None:
                answers[event.id] = event.index + 1
        side.check()
    assert answers == {f"{number}": max_tokens for number, (_, max_tokens) in enumerate(asks)}, "some are starved"


def test_what_is_reserved_or_waits_counts_before_it_grows() -> None:
    s = scheduler(40)
    s.reserve(sequence("reserved", [1] * 8, 5))
    assert s.pool.counts().lent == 2
    # Eight tokens lie in what is lent; of five tokens of the answer the last needs no slot.
    assert s.num_growth_blocks == 1
    s.add(sequence("waiting", [2] * 9, 1))
    assert s.num_growth_blocks == 3  # its prompt's three, when the other has just begun
    assert s.num_growth_blocks == peak_growth([Growing(2, 8, 4), Growing(0, 9, 0)], BLOCK)


def test_growth_is_expected_by_what_answers_were_of_late() -> None:
    s, model = scheduler(60), FakeModel(60)
    s.add(sequence("long", [1] * 4, 200))
    assert s.num_growth_blocks == 1 + 16  # a prompt, and the first guess of 64 tokens
    assert s.num_expected_answer_tokens == 64
    for i in range(8):
        s.add(sequence(f"short {i}", [i + 2] * 4, 4))
    while s.num_sequences > 1:
        plan = s.plan()
        assert plan is not None
        s.complete(plan, model.run(plan))
    assert s.num_expected_answer_tokens == 4
    long = s.get(SequenceId("long"))
    assert long is not None
    assert s.num_growth_blocks < 16
