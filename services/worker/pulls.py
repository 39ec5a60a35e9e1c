"""Blocks of this pool into which other workers' cached blocks are being read.  Pure: no memory, clock or socket in here.

    ASKING ──lend──▶ READING ──read_ended──▶ READ ──conclude──▶ ENDED
       │                │                      │
       └──────stop──────┼─────────stop─────────┴──────────────▶ ENDED
                        └──stop──▶ STOPPING ──read_ended──────▶ ENDED

The blocks are LENT while they are read into, QUARANTINED from a stop until the read has ended, and then free; or cached
under their hashes, if there was proof that they were what they should be.  So nobody gets a block that a read may still
write into, whatever became of the request, the holder or the deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from services.engine.blocks import BlockPool

# Reads that copy within one host's memory: more at once make each slower and none sooner.
MAX_PULLS = 8


class PullState(Enum):
    ASKING = auto()
    READING = auto()
    STOPPING = auto()
    READ = auto()
    ENDED = auto()


class TooManyPullsError(Exception):
    """Pulls are at their bound; none was begun."""


@dataclass(slots=True, eq=False)
class Pull:
    """``prefix``: the blocks before those that are ``lacking``, kept in the cache for as long as it lasts."""

    prefix: tuple[int, ...]
    lacking: tuple[bytes, ...]
    blocks: tuple[int, ...] = ()
    state: PullState = field(default=PullState.ASKING)


class PullBook:
    """The pulls into one pool, which it shares with a scheduler: calls come from one place at a time (the engine's
    exclusive section)."""

    def __init__(self, pool: BlockPool, *, max_pulls: int) -> None:
        self._pool = pool
        self._max_pulls = max_pulls
        self._pulls: dict[Pull, None] = {}

    @property
    def num_pulls(self) -> int:
        return len(self._pulls)

    def find(self, chain: Sequence[bytes]) -> Pull | None:
        """The pull that reads the first block of the chain that is not here."""
        num_held = len(self._pool.match(chain))
        if num_held == len(chain):
            return None
        return next((p for p in self._pulls if p.lacking[0] == chain[num_held] and p.state in _GOING), None)

    def begin(self, chain: Sequence[bytes]) -> Pull | None:
        """A pull of what is lacking of the chain; None when nothing is.  Raises TooManyPullsError."""
        prefix = self._pool.match(chain)
        if len(prefix) == len(chain):
            return None
        if len(self._pulls) >= self._max_pulls:
            raise TooManyPullsError(f"{len(self._pulls)} pulls are under way, as many as may")
        self._pool.acquire(prefix)
        pull = Pull(tuple(prefix), tuple(chain[len(prefix) :]))
        self._pulls[pull] = None
        return pull

    def lend(self, pull: Pull, count: int) -> tuple[int, ...]:
        """Blocks for the first ``count`` that are lacking, to be read into from now on.  Raises OutOfBlocksError."""
        assert pull.state is PullState.ASKING, f"the pull is {pull.state.name}"
        assert 0 < count <= len(pull.lacking), f"{count} of {len(pull.lacking)} lacking blocks"
        pull.blocks = tuple(self._pool.lend(count))
        pull.state = PullState.READING
        return pull.blocks

    def read_ended(self, pull: Pull) -> None:
        """Well or badly: nothing is written into its blocks any more.  A stopped one ends here."""
        if pull.state is PullState.STOPPING:
            self._pool.restore(pull.blocks)
            self._end(pull)
            return
        assert pull.state is PullState.READING, f"the pull is {pull.state.name}"
        pull.state = PullState.READ

    def conclude(self, pull: Pull) -> None:
        """There is proof that what was read is good: the blocks are cached here, as others are."""
        assert pull.state is PullState.READ, f"the pull is {pull.state.name}"
        self._pool.settle(pull.blocks)
        for block, hash_ in zip(pull.blocks, pull.lacking, strict=False):
            self._pool.remember(block, hash_)
        self._pool.release(pull.blocks)
        self._end(pull)

    def stop(self, pull: Pull) -> None:
        """Ends it, with nothing gained; one that is READING when ``read_ended`` says so.  Idempotent."""
        match pull.state:
            case PullState.ASKING:
                self._end(pull)
            case PullState.READING:
                self._pool.quarantine(pull.blocks)
                pull.state = PullState.STOPPING
            case PullState.READ:
                self._pool.quarantine(pull.blocks)
                self._pool.restore(pull.blocks)
                self._end(pull)

    def references(self) -> dict[int, int]:
        """How many of the pool's references on each block are pulls'."""
        counted: dict[int, int] = {}
        for pull in self._pulls:
            for block in pull.prefix:
                counted[block] = counted.get(block, 0) + 1
        return counted

    def away(self) -> frozenset[int]:
        """The LENT and QUARANTINED blocks that are pulls'."""
        return frozenset(block for pull in self._pulls for block in pull.blocks)

    def check_integrity(self) -> None:
        """Raises AssertionError unless pulls stay in their bound and their blocks are in their states, each in one pull."""
        assert self.num_pulls <= self._max_pulls, f"{self.num_pulls} pulls, {self._max_pulls} may be"
        lent, quarantined = set(self._pool.lent_blocks()), set(self._pool.quarantined_blocks())
        for pull in self._pulls:
            assert pull.state is not PullState.ENDED, "a pull that has ended is kept"
            assert bool(pull.blocks) == (pull.state is not PullState.ASKING), (
                f"blocks of a pull that is {pull.state.name}"
            )
            where = quarantined if pull.state is PullState.STOPPING else lent
            assert where.issuperset(pull.blocks), f"blocks of a pull that is {pull.state.name} are in another state"
        assert len(self.away()) == sum(len(pull.blocks) for pull in self._pulls), "two pulls share a block"

    def check_nothing_else_is_away(self) -> None:
        """Where pulls alone take blocks away.  Raises AssertionError."""
        away = {*self._pool.lent_blocks(), *self._pool.quarantined_blocks()}
        assert away == self.away(), "LENT or QUARANTINED blocks are no pull's"

    def _end(self, pull: Pull) -> None:
        """The end of the prefix is evicted before its beginning, and so after what was read behind it."""
        pull.state = PullState.ENDED
        del self._pulls[pull]
        self._pool.release(pull.prefix)


def stood(held: bool | None, *, read_ended_s: float, lease_ends_s: float) -> bool:
    """Whether a pin covered a read to its last byte.  ``held`` is what the holder said when it was released, after that;
    None where it did not answer.  Then the lease decides, by the reader's clock, counted from before it asked (ADR 7)."""
    return read_ended_s < lease_ends_s if held is None else held


_GOING = (PullState.ASKING, PullState.READING, PullState.READ)
