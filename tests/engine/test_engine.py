"""The engine's step: what it tells, and when."""

from __future__ import annotations

import os
import threading
import time

from services.engine.batch import Batch
from services.engine.blocks import BlockPool, CacheChange
from services.engine.engine import Engine, StepTime
from services.engine.lookup import Drafter
from services.engine.ready import Ready
from services.engine.sampling_params import Drawn, Sampling
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Event, Sequence, SequenceId, StepFailed, TokenDrawn
from services.engine.step_times import NUM_EXPECTING, StepTimes
from services.engine.steps import Blocking, Draws, Outcome
from tests.engine.fake_device import FakeMark


class Recorder:
    """Runner and listener in one, so that the order between them is seen."""

    runs_ahead = False
    ready: Ready | None = None

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.breaks = False

    def start(self, batch: Batch) -> Blocking:
        return Blocking(lambda: self.run(batch), lambda: self.ready)

    def run(self, batch: Batch) -> Draws:
        self.seen.append("run")
        if self.breaks:
            raise RuntimeError("out of memory")
        return [Drawn(1) for _ in batch.samples]

    def on_started(self, events: list[Event]) -> None:
        self.seen += [f"{type(event).__name__} {event.id}" for event in events]

    def on_events(self, events: list[Event], step: StepTime) -> None:
        self.seen += [f"{type(event).__name__} {event.id}" for event in events]

    def on_cache_changes(self, changes: list[CacheChange]) -> None: ...

    def on_copied(self) -> None: ...

    def on_death(self, error: BaseException) -> None: ...


def engine(recorder: Recorder) -> Engine:
    return Engine(
        Scheduler(BlockPool(16), Limits(block_size=4, context_length=64, max_step_tokens=8)), recorder, recorder
    )


def add(e: Engine, name: str, num_tokens: int) -> None:
    with e.exclusive() as scheduler:
        scheduler.add(
            Sequence(SequenceId(name), [*range(num_tokens)], Sampling(), 1, frozenset(), [b"root"], prefill_only=True)
        )


def test_a_start_is_told_before_its_first_step_runs() -> None:
    """So the blocks of a cached prefix travel while the rest is computed."""
    recorder = Recorder()
    e = engine(recorder)
    add(e, "a", 12)
    assert e.step()
    assert recorder.seen == ["Started a", "run", "ChunkComputed a"]
    assert e.step()
    assert recorder.seen[3:] == ["run", "ChunkComputed a", "TokenDrawn a"]
    assert not e.step()


def test_a_step_that_breaks_has_told_all_that_started() -> None:
    recorder = Recorder()
    e = engine(recorder)
    recorder.breaks = True
    add(e, "a", 12)
    add(e, "b", 12)
    assert e.step()
    assert recorder.seen == ["Started a", "Started b", "run", "StepFailed a"]


def test_a_gap_is_counted_between_steps_that_follow_each_other_and_not_over_idle_time() -> None:
    recorder = Recorder()
    e = engine(recorder)
    add(e, "a", 12)  # two chunks
    assert e.step()
    assert sum(e.gaps.counts) == 0
    time.sleep(0.3)
    assert e.step()
    assert sum(e.gaps.counts) == 1
    assert e.gaps.counts[-1] == 1
    assert e.gaps.total_s > 0.3
    assert not e.step()
    add(e, "b", 24)  # of which the cache holds 12
    assert e.step()
    assert sum(e.gaps.counts) == 1
    assert e.step()
    assert sum(e.gaps.counts) == 2


def test_the_engines_thread_keeps_to_its_processors() -> None:
    recorder = Recorder()
    cpu = max(os.sched_getaffinity(0))
    e = Engine(Scheduler(BlockPool(16), Limits(block_size=4, context_length=64)), recorder, recorder, frozenset({cpu}))
    found: list[set[int]] = []
    ran = threading.Event()

    def run(batch: Batch) -> list[Drawn]:
        found.append(os.sched_getaffinity(0))
        ran.set()
        return [Drawn(1) for _ in batch.samples]

    recorder.run = run  # type: ignore[method-assign]
    add(e, "a", 4)
    e.start()
    assert ran.wait(10)
    e.close()
    assert found == [{cpu}]


def test_events_of_a_step_that_still_runs_say_when_it_is_in_memory() -> None:
    """Those of a prompt that starts behind it, too: what the cache has of it may be of that very step."""
    recorder = Recorder()
    seen: list[Event] = []
    recorder.on_events = lambda events, step: seen.extend(events)  # type: ignore[method-assign]
    recorder.on_started = seen.extend  # type: ignore[method-assign]
    e = engine(recorder)
    add(e, "a", 12)
    recorder.ready = first = FakeMark(lambda: None)
    assert e.step()
    assert e.work.prefill_tokens_per_s == 0  # it has waited for nothing, so its time is unknown
    add(e, "b", 12)
    recorder.ready = None
    assert e.step()
    assert e.work.prefill_tokens_per_s > 0
    assert [(type(event).__name__, event.id, getattr(event, "ready", None)) for event in seen] == [
        ("Started", "a", None), ("ChunkComputed", "a", first), ("Started", "b", first),
        ("ChunkComputed", "a", None), ("TokenDrawn", "a", None), ("ChunkComputed", "b", None),
        ("TokenDrawn", "b", None),
    ]  # fmt: skip


def test_accepted_drafts_are_counted() -> None:
    """The model says 1 for ever, as its prompt does: 8 tokens, 1 of them drawn with the prompt, the rest in two steps."""
    e = engine(Recorder())
    with e.exclusive() as scheduler:
        scheduler.add(Sequence(SequenceId("a"), [1] * 8, Sampling(), 8, frozenset(), [b"root"], drafter=Drafter()))
    while e.step():
        pass
    work = e.work
    assert (work.prefill_tokens, work.decode_tokens, work.steps) == (8, 7, 3)
    assert (work.drafted_tokens, work.accepted_tokens) == (5, 5)


def test_steps_that_decode_alone_are_compared_with_those_before() -> None:
    e = engine(Recorder())
    stream(e, "a", 40)
    while not e.step_sums.scatter[0]:
        assert e.step()
    assert NUM_EXPECTING < e.work.decode_tokens <= NUM_EXPECTING + 2
    for _ in range(3):
        e.step()
    assert e.step_sums.scatter[0] == 4
    stream(e, "b", 1)
    e.step()  # of both
    assert e.step_sums.scatter[0] == 4
    e.step()
    assert e.step_sums.scatter[0] == 5


def test_steps_count_by_what_those_of_their_kind_took_before() -> None:
    e = engine(Recorder())
    stream(e, "a", 1)
    assert e.step(), "a prompt, of which nobody knows what to expect"
    assert e.step_sums.squares == e.step_sums.shares[0] == 1
    for _ in range(2 * NUM_EXPECTING):
        e.step_times.observe(1, 1e3)
    stream(e, "b", 4)
    e.step()
    assert e.step_sums.squares == e.step_sums.shares[0] == 2, "still a prompt"
    e.step()
    assert e.step_sums.shares[0] == 3
    assert 2 < e.step_sums.squares < 2.1, "it took next to nothing of the thousand seconds expected"
    before = e.step_sums.squares
    e.step_times = StepTimes()
    for _ in range(2 * NUM_EXPECTING):
        e._prompt_times.observe(8, 1e3)
        e.step_times.observe(1, 1e-9)
    stream(e, "c", 1)
    e.step()
    assert before < e.step_sums.squares < before + 0.1, "of both kinds at once what both take is expected"


def test_prompts_tell_what_to_expect_of_prompts() -> None:
    e = engine(Recorder())
    for number in range(NUM_EXPECTING + 1):
        assert e.step_sums.squares == number, "too few were seen"
        stream(e, f"{number}", 1)
        e.step()
    stream(e, "last", 1)
    e.step()
    assert e.step_sums.squares != e.step_sums.shares[0]


def test_a_step_with_drafts_is_compared_with_none() -> None:
    e = engine(Recorder())
    for _ in range(2 * NUM_EXPECTING):
        e.step_times.observe(1, 0.001)
    with e.exclusive() as scheduler:
        scheduler.add(Sequence(SequenceId("a"), [1] * 8, Sampling(), 8, frozenset(), [b"root"], drafter=Drafter()))
    while e.step():
        pass
    assert e.work.drafted_tokens
    assert e.step_sums.scatter[0] == 0


class Ahead(Recorder):
    """Takes the next step while one is under way; computes the plan's tokens as 10, 11, 12 and so on."""

    runs_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.num_started = 0

    def start(self, batch: Batch) -> AheadStep:  # type: ignore[override]
        if self.breaks:
            raise RuntimeError("no such block")
        self.num_started += 1
        self.seen.append(f"start {self.num_started} {batch.token_ids.tolist()}")
        return AheadStep(self, self.num_started, batch)


class AheadStep:
    def __init__(self, runner: Ahead, number: int, batch: Batch) -> None:
        self._runner, self._number, self._batch = runner, number, batch

    def wait_nearly(self) -> None:
        self._runner.seen.append(f"nearly {self._number}")

    def result(self) -> Outcome:
        self._runner.seen.append(f"result {self._number}")
        return Outcome([Drawn(9 + self._number) for _ in self._batch.samples], self._number, self._number + 0.75)


def stream(e: Engine, name: str, max_tokens: int) -> None:
    with e.exclusive() as scheduler:
        scheduler.add(Sequence(SequenceId(name), [1, 2], Sampling(), max_tokens, frozenset({12}), [b"root"]))


def test_the_next_step_is_handed_over_before_the_one_under_way_has_ended() -> None:
    recorder = Ahead()
    e = engine(recorder)
    stream(e, "a", 9)
    while e.step():
        pass
    assert recorder.seen == [
        *("Started a", "start 1 [1, 2]"),
        *("nearly 1", "start 2 [-1]", "result 1", "ChunkComputed a", "TokenDrawn a"),
        *("nearly 2", "start 3 [-1]", "result 2", "TokenDrawn a"),
        *("nearly 3", "start 4 [-1]", "result 3", "TokenDrawn a"),  # token 12 ends it
        *("nearly 4", "result 4"),
    ]
    assert sum(e.gaps.counts) == 3
    assert e.gaps.total_s == 3 * 0.25
    assert (e.work.prefill_tokens, e.work.decode_tokens) == (2, 3)


def test_who_was_delivered_goes_on_when_its_step_begins_not_when_it_is_handed_over() -> None:
    recorder = Ahead()
    e = engine(recorder)
    stream(e, "a", 3)
    with e.exclusive() as scheduler:
        _, lent = scheduler.reserve(Sequence(SequenceId("b"), [1, 2], Sampling(), 3, frozenset(), [b"root"]))
    start = recorder.start

    def deliver_and_start(batch: Batch) -> AheadStep:  # while the first step is planned, so that the second has both
        if recorder.num_started == 0:
            with e.exclusive() as scheduler:
                scheduler.deliver(SequenceId("b"), lent, Drawn(7))
        return start(batch)

    recorder.start = deliver_and_start  # type: ignore[method-assign]
    while e.step():
        pass
    assert recorder.seen[:6] == [
        *("Started a", "start 1 [1, 2]", "nearly 1", "start 2 [-1, 7]", "result 1", "ChunkComputed a"),
    ]
    assert recorder.seen[6:9] == ["TokenDrawn a", "Resumed b", "nearly 2"], "not before the step ahead had ended"
    assert recorder.seen.count("Resumed b") == 1


def test_a_delivered_token_is_told_though_the_step_behind_it_fails() -> None:
    recorder = Ahead()
    e = engine(recorder)
    with e.exclusive() as scheduler:
        _, lent = scheduler.reserve(Sequence(SequenceId("b"), [1, 2], Sampling(), 3, frozenset(), [b"root"]))
        scheduler.deliver(SequenceId("b"), lent, Drawn(7))
    recorder.breaks = True
    assert e.step()
    assert recorder.seen == ["Resumed b", "StepFailed b"]


def test_a_step_that_cannot_be_handed_over_fails_when_its_turn_comes() -> None:
    recorder = Ahead()
    e = engine(recorder)
    stream(e, "a", 9)
    heard: list[Event] = []
    recorder.on_events = lambda events, step: heard.extend(events)  # type: ignore[method-assign]
    assert e.step()
    recorder.breaks = True
    while e.step():
        pass
    assert [type(event) for event in heard[1:]] == [TokenDrawn, TokenDrawn, StepFailed]
    with e.exclusive() as scheduler:
        scheduler.check_integrity()
        assert scheduler.num_sequences == 0
