"""Where a worker's time goes: prefill, decode, transfer or nothing.  Pure: times come in, by one monotonic clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from services.engine.phases import Ceilings, Demand, ModelShape, Piece, split_demand

# Of the shares and rates of the last seconds.
HALF_LIFE_S = 10.0


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    TRANSFER = "transfer"
    IDLE = "idle"


COMPUTED = (Phase.PREFILL, Phase.DECODE)


@dataclass(slots=True)
class _Recent:
    """Sums over a phase's own last seconds, older ones weighing less."""

    seconds: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0

    def add(self, seconds: float, demand: Demand) -> None:
        keep = 0.5 ** (seconds / HALF_LIFE_S)
        self.seconds = self.seconds * keep + seconds
        self.flops = self.flops * keep + demand.flops
        self.nbytes = self.nbytes * keep + demand.nbytes


@dataclass(frozen=True, slots=True)
class Use:
    """Of a computing phase, over its last seconds of work; zeros before the first.  FLOP/byte, and shares of the ceilings,
    0 where these are not known."""

    intensity: float
    mfu: float
    mbu: float


@dataclass(slots=True)
class PhaseBook:
    """Every instant from ``began_s`` on belongs to one phase, up to the end of the last step, or now while nothing is
    computed.  A step's time is prefill's and decode's by the seconds that each would take at least, on this machine.
    Transfer is the time in which own one-sided operations are under way and nothing is computed; idle is the rest, the
    moments between steps included.

    ``shape`` None: demands are not counted, and steps of both phases are shared by tokens.  Not thread-safe."""

    shape: ModelShape | None = None
    ceilings: Ceilings = field(default_factory=Ceilings)
    began_s: float = 0.0
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    demands: dict[Phase, Demand] = field(default_factory=lambda: {phase: Demand() for phase in COMPUTED})
    shares: dict[Phase, float] = field(default_factory=lambda: {phase: float(phase is Phase.IDLE) for phase in Phase})
    _recent: dict[Phase, _Recent] = field(default_factory=lambda: {phase: _Recent() for phase in COMPUTED})
    _told_s: float = field(init=False)  # up to where time has been given to phases
    _computing: bool = False
    _num_transfers: int = 0

    def __post_init__(self) -> None:
        self._told_s = self.began_s

    @property
    def told_s(self) -> float:
        """Up to when every instant has its phase."""
        return self._told_s

    def compute(self, now_s: float) -> None:
        """From now on there is something to compute.  Idempotent."""
        self.look(now_s)
        self._computing = True

    def rest(self, now_s: float) -> None:
        """From now on there is nothing to compute.  Idempotent."""
        if self._computing:
            self._computing = False
            self._give(now_s, {Phase.IDLE: 1.0})

    def transfer(self, now_s: float) -> None:
        """One more is under way."""
        self.look(now_s)
        self._num_transfers += 1

    def transferred(self, now_s: float) -> None:
        assert self._num_transfers, "a transfer ends once"
        self.look(now_s)
        self._num_transfers -= 1

    def look(self, now_s: float) -> None:
        """Gives the time up to now to its phase, where that is known already."""
        if not self._computing:
            self._give(now_s, {Phase.TRANSFER if self._num_transfers else Phase.IDLE: 1.0})

    def step(self, prefill: Iterable[Piece], decode: Iterable[Piece], began_s: float, ended_s: float) -> None:
        """One that was computed, in the order of their ends."""
        prefill, decode = list(prefill), list(decode)
        self._give(began_s, {Phase.IDLE: 1.0})
        elapsed_s = max(0.0, ended_s - self._told_s)
        if self.shape is None:
            demands = Demand(), Demand()
            times = float(sum(p.num_new for p in prefill)), float(sum(p.num_new for p in decode))
        else:
            demands = split_demand(self.shape, prefill, decode)
            times = self.ceilings.seconds(demands[0]), self.ceilings.seconds(demands[1])
        total = sum(times)
        shares = {phase: time / total for phase, time in zip(COMPUTED, times, strict=True) if time}
        self._give(ended_s, shares)
        for phase, demand in zip(COMPUTED, demands, strict=True):
            if share := shares.get(phase):
                self.demands[phase] += demand
                self._recent[phase].add(elapsed_s * share, demand)

    def use(self, phase: Phase) -> Use:
        recent = self._recent[phase]
        if not recent.seconds or not recent.nbytes:
            return Use(0.0, 0.0, 0.0)
        return Use(
            recent.flops / recent.nbytes,
            self.ceilings.mfu(recent.flops / recent.seconds),
            self.ceilings.mbu(recent.nbytes / recent.seconds),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless every second has one phase."""
        told_s = self._told_s - self.began_s
        assert abs(sum(self.seconds.values()) - told_s) <= 1e-6 * max(1.0, told_s)
        assert abs(sum(self.shares.values()) - 1) < 1e-6

    def _give(self, until_s: float, to: dict[Phase, float]) -> None:
        elapsed_s = until_s - self._told_s
        if elapsed_s <= 0:
            return
        self._told_s = until_s
        keep = 0.5 ** (elapsed_s / HALF_LIFE_S)
        for phase in Phase:
            part = to.get(phase, 0.0)
            self.seconds[phase] += elapsed_s * part
            self.shares[phase] = self.shares[phase] * keep + part * (1 - keep)
