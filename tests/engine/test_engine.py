"""The engine's step: what it tells, and when."""

from __future__ import annotations

from services.engine.batch import Batch
from services.engine.blocks import BlockPool, CacheChange
from services.engine.engine import Engine, StepTime
from services.engine.lookup import Drafter
from services.engine.sampling_params import DrawFailed, Drawn, Sampling
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Event, Sequence, SequenceId


class Recorder:
    """Runner and listener in one, so that the order between them is seen."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.breaks = False

    def run(self, batch: Batch) -> list[Drawn | DrawFailed | None]:
        self.seen.append("run")
        if self.breaks:
            raise RuntimeError("out of memory")
        return [Drawn(1) for _ in batch.samples]

    def on_started(self, events: list[Event]) -> None:
        self.seen += [f"{type(event).__name__} {event.id}" for event in events]

    def on_events(self, events: list[Event], step: StepTime) -> None:
        self.seen += [f"{type(event).__name__} {event.id}" for event in events]

    def on_cache_changes(self, changes: list[CacheChange]) -> None: ...

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
