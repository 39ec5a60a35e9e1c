"""What both roles have in common: a pool that the transport can reach, and an engine that computes in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from kvferry import __version__
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.errors import ConflictError, InvalidRequestError, OverloadedError, UnavailableError
from services.engine.blocks import OutOfBlocksError
from services.engine.engine import Engine
from services.engine.hashing import chain_root
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.phase_book import PhaseBook
from services.engine.scheduler import NeverFitsError, QueueFullError
from services.engine.sequence import Sequence, SequenceId
from services.runtime.process import ProcessIdentity
from services.runtime.protocol import SPOKEN
from services.worker.convert import (
    to_block_counts,
    to_layout_proto,
    to_path,
    to_phase_loads,
    to_sequence,
    to_step_sums,
    to_transfer_rate,
)
from services.worker.events import EventRouter
from services.worker.pins import PinBook
from services.worker.pull_times import PullTimes
from services.worker.pulls import MAX_PULLS, PullBook
from services.worker.transfer_times import TransferTimes
from transport import Region, Transport
from transport.reach import Reach

log = structlog.get_logger(__name__)

RETRY_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Identity:
    worker_id: str
    incarnation: int
    role: common_pb2.WorkerRole.ValueType
    control_address: str
    process: ProcessIdentity


@dataclass(slots=True)
class Traffic:
    """KV blocks since start: written into others' pools, committed into ours, and pulled from others' into ours.
    ``checks``: transfers into our pool that were verified; what was digested for checks counts on both sides.  ``pulls``
    by outcome."""

    blocks_written: int = 0
    bytes_written: int = 0
    blocks_received: int = 0
    bytes_received: int = 0
    blocks_pulled: int = 0
    bytes_pulled: int = 0
    pulls: Counter[str] = field(default_factory=Counter)
    pull_s: float = 0.0
    checks_ok: int = 0
    checks_mismatch: int = 0
    bytes_digested: int = 0
    digest_s: float = 0.0


async def _nobody_to_tell() -> None:
    """Where the worker is in no cluster."""


@dataclass(slots=True, eq=False)
class Worker:
    """Owned by the event loop.  ``pins`` and ``pulls`` belong to the engine's exclusive section, as the scheduler does.
    ``role_checks`` verify what each role adds to their accounts, while the worker has it; ``end_streams`` ends, with their
    last requests, the streams that callers of the role keep open between requests; ``report_load`` tells the directory
    soon, ``register_anew`` returns when it knows what the worker is now; ``tell_draining`` makes the server's health say
    so.  ``region`` is the pool's, or the first rank's part of it; ``further_regions`` are the others', in order."""

    identity: Identity
    model: ModelConfig
    layout: KvLayout
    transport: Transport
    region: Region
    engine: Engine
    router: EventRouter
    pins: PinBook
    further_regions: tuple[Region, ...] = ()
    speculates: bool = False  # where a request does not say
    paths: tuple[Reach, ...] = ()  # by which the pool can be reached; none: not known
    labels: Mapping[str, str] = field(default_factory=dict)
    role_checks: dict[common_pb2.WorkerRole.ValueType, Callable[[], None]] = field(default_factory=dict)
    end_streams: Callable[[], None] = lambda: None
    report_load: Callable[[], None] = lambda: None
    register_anew: Callable[[], Awaitable[None]] = _nobody_to_tell
    tell_draining: Callable[[], Awaitable[None]] = _nobody_to_tell
    traffic: Traffic = field(default_factory=Traffic)
    transfer_times: TransferTimes = field(default_factory=TransferTimes)
    pull_times: PullTimes = field(default_factory=PullTimes)
    draining: bool = False  # for good
    changing_role: bool = False
    holds_role: str = ""  # why it cannot become a decode worker; empty: it can
    num_opening: int = 0  # requests that are on their way to the scheduler
    pulls: PullBook = field(init=False)

    def __post_init__(self) -> None:
        with self.engine.exclusive(wake=False) as scheduler:
            self.pulls = PullBook(scheduler.pool, max_pulls=MAX_PULLS)

    @property
    def takes_work(self) -> bool:
        return not (self.draining or self.changing_role)

    @property
    def regions(self) -> tuple[Region, ...]:
        """One for each rank."""
        return (self.region, *self.further_regions)

    def make_sequence(
        self,
        request_id: str,
        prompt: list[int],
        params: common_pb2.SamplingParams,
        cache_salt: bytes,
        *,
        prefill_only: bool = False,
    ) -> Sequence:
        """A sequence under an id of its own: one request may come twice, after a failure.  Raises InvalidRequestError, or
        UnavailableError while draining, and for what is the other role's to do."""
        self.require_taking_work()
        if prefill_only != (self.identity.role == common_pb2.WORKER_ROLE_PREFILL):
            name = self.identity.worker_id
            raise UnavailableError(f"worker {name} has another role than it had", reason="OTHER_ROLE")
        return to_sequence(
            SequenceId(f"{request_id}/{time.monotonic_ns():x}"),
            prompt,
            params,
            chain_root=chain_root(self.model.revision, cache_salt),
            eos_ids=frozenset(self.model.eos_token_ids),
            vocab_size=self.model.vocab_size,
            context_length=self.model.context_length,
            prefill_only=prefill_only,
            speculate=self.speculates,
        )

    def require_taking_work(self) -> None:
        """Raises UnavailableError while draining or between two roles."""
        if not self.takes_work:
            raise UnavailableError(f"worker {self.identity.worker_id} is draining", reason="DRAINING")

    def add(self, sequence: Sequence) -> None:
        """Queues it.  Raises OverloadedError or InvalidRequestError."""
        with refusals_as_errors(), self.engine.exclusive() as scheduler:
            scheduler.add(sequence)

    def require_incarnation(self, incarnation: int) -> None:
        """Raises ConflictError when a message was meant for an earlier process of this worker's name."""
        if incarnation != self.identity.incarnation:
            raise ConflictError(
                f"worker {self.identity.worker_id} has incarnation {self.identity.incarnation}, "
                f"the message is for {incarnation}: that process has ended",
                reason="OTHER_INCARNATION",
            )

    @contextmanager
    def transferring(self) -> Iterator[None]:
        """While a one-sided operation of ours is under way."""
        with self.engine.exclusive(wake=False):
            self.engine.phases.transfer(time.monotonic())
        try:
            yield
        finally:
            with self.engine.exclusive(wake=False):
                self.engine.phases.transferred(time.monotonic())

    @contextmanager
    def phases(self) -> Iterator[PhaseBook]:
        """As of now; the engine waits."""
        with self.engine.exclusive(wake=False):
            self.engine.phases.look(time.monotonic())
            yield self.engine.phases

    def load(self) -> directory_pb2.WorkerLoad:
        with self.phases() as book:
            phases = to_phase_loads(book)
        with self.engine.exclusive(wake=False) as scheduler:
            counts = scheduler.pool.counts()
            running, waiting = scheduler.num_running, scheduler.num_waiting
            queued = scheduler.num_queued_prefill_tokens
            host = scheduler.host.counts()
            num_growth_blocks, num_expected = scheduler.num_growth_blocks, scheduler.num_expected_answer_tokens
            num_pins, num_pinned_blocks = self.pins.num_pins, self.pins.num_blocks
            num_pinnable_blocks = self.pins.num_pinnable if self.layout.tp == 1 else 0  # see Holdings
            step_base_s, step_per_sequence_s = self.engine.step_times.line()
            step_sums = to_step_sums(self.engine.step_sums)
        work = self.engine.work
        return directory_pb2.WorkerLoad(
            blocks=to_block_counts(counts),
            num_running=running,
            num_waiting=waiting,
            num_queued_prefill_tokens=queued,
            prefill_tokens_per_s=work.prefill_tokens_per_s,
            decode_tokens_per_s=work.decode_tokens_per_s,
            draining=not self.takes_work,
            num_pins=num_pins,
            num_pinned_blocks=num_pinned_blocks,
            decode_step_base_s=step_base_s,
            decode_step_per_sequence_s=step_per_sequence_s,
            transfer_bytes_per_s=self.transfer_times.bytes_per_s,
            transfer_round_trip_s=self.transfer_times.round_trip_s,
            num_host_blocks=host.held,
            num_host_slots=host.total,
            host_load_bytes_per_s=self.engine.host_load_bytes_per_s,
            pull_bytes_per_s=self.pull_times.bytes_per_s,
            pull_overhead_s=self.pull_times.overhead_s,
            num_pinnable_blocks=num_pinnable_blocks,
            num_growth_blocks=num_growth_blocks,
            num_expected_answer_tokens=num_expected,
            step_sums=step_sums,
            phases=phases,
            transfer_rates=[to_transfer_rate(*measured) for measured in self.transfer_times.by_distance()],
        )

    def info(self) -> directory_pb2.WorkerInfo:
        identity = self.identity
        return directory_pb2.WorkerInfo(
            worker_id=identity.worker_id,
            incarnation=identity.incarnation,
            role=identity.role,
            control_address=identity.control_address,
            model=common_pb2.ModelInfo(
                name=self.model.name,
                revision=self.model.revision,
                context_length=self.model.context_length,
                vocab_size=self.model.vocab_size,
            ),
            layout=self.layout_proto(),
            version=__version__,
            process=identity.process.to_proto(),
            newest_protocol=SPOKEN.newest,
            oldest_protocol=SPOKEN.oldest,
            paths=map(to_path, self.paths),
            labels=self.labels,
        )

    def layout_proto(self) -> common_pb2.Layout:
        return to_layout_proto(self.layout)

    def integrity_ok(self) -> bool:
        """True when every block is accounted for; what differs is logged."""
        try:
            with self.engine.exclusive(wake=False) as scheduler:
                self.engine.phases.check_integrity()
                scheduler.check_integrity(Counter(self.pins.references()) + Counter(self.pulls.references()))
                self.pins.check_integrity()
                self.pulls.check_integrity()
                self.role_checks.get(self.identity.role, lambda: None)()
        except AssertionError as e:
            log.error("integrity", difference=str(e))
            return False
        return True

    async def idle(self) -> None:
        """Returns when nothing is held for anybody.  The caller sets the deadline."""
        while not self.is_idle():
            self.router.changed.clear()
            await self.router.changed.wait()

    def is_idle(self) -> bool:
        with self.engine.exclusive(wake=False) as scheduler:
            counts = scheduler.pool.counts()
            return not (
                self.num_opening or scheduler.num_sequences or counts.lent or counts.quarantined
                or self.pins.num_pins or self.pulls.num_pulls
            )  # fmt: skip


class refusals_as_errors:
    """Turns what the scheduler refuses into errors for the caller."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        match error:
            case QueueFullError() | OutOfBlocksError():
                raise OverloadedError(str(error), retry_after_s=RETRY_AFTER_S) from error
            case NeverFitsError():
                raise InvalidRequestError(str(error), reason="TOO_LONG_FOR_POOL") from error
            case _:
                return
