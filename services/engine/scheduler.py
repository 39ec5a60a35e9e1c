"""Which sequences compute how many tokens in the next step.  Pure: calls in, plans and events out.

One core for every role.  A sequence has tokens and a count of how many are computed; decoding is the case of one token
to compute, prefill of many, so chunked prefill, prefix hits, preempted sequences and KV that a writer delivered all
take the same path (as in vLLM's V1 scheduler).

A step may be planned while the one before it runs, so that nobody waits for the plan: its tokens that are still to be
drawn are named by who draws them.  What ends with such a token is computed once too often, and that is thrown away.

What the pool has evicted may come back from the host by a copy (host_tier.py).  Nothing of a sequence is computed before
its copy has ended, and nobody else waits for that; where it fails, what was to be copied is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from itertools import islice, takewhile
from types import MappingProxyType

from services.engine.batch import Entry, awaited_token
from services.engine.blocks import BlockPool, CacheChange, OutOfBlocksError
from services.engine.growth import AnswerLengths, Growing, peak_growth
from services.engine.hashing import extend_chain
from services.engine.host_tier import Copy, HostTier
from services.engine.lookup import share_out
from services.engine.sampling_params import DrawFailed, Drawn
from services.engine.sequence import (
    ChunkComputed,
    Event,
    FinishReason,
    Resumed,
    Sequence,
    SequenceId,
    Stage,
    Started,
    StepFailed,
    TokenDrawn,
)

MOST_OPEN = 2  # plans


class QueueFullError(Exception):
    """The waiting queue is at its bound; nothing was taken."""


class NeverFitsError(Exception):
    """The prompt leaves no room for an answer, even in an empty pool."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_step_tokens`` bounds one step's new tokens, and so a prefill chunk; ``max_mixed_tokens`` a prefill chunk in a
    step in which others decode, for it makes them wait (0: nothing but the former); ``max_running`` its sequences;
    ``max_pinned`` the blocks that others than sequences may hold (services/worker/pins.py).  Drafts are added to a step as
    long as it has no more than ``max_draft_rows`` tokens.  ``look_ahead``: a sequence whose last block is full gets its
    next one a step early, where blocks are to spare, so that a runner can make the next step's metadata while it waits."""

    block_size: int
    context_length: int
    max_step_tokens: int = 256
    max_mixed_tokens: int = 0
    max_running: int = 64
    max_waiting: int = 256
    max_pinned: int = 0
    max_draft_rows: int = 24
    look_ahead: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes: ``counts[i]`` tokens of ``sequences[i]``, and the drafts behind them in ``entries[i]``;
    ``decodes[i]``: behind a token that was drawn.  ``started`` happened while planning: to be told whatever becomes of the
    step; ``resumed`` happens when the step begins."""

    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    decodes: tuple[bool, ...]
    entries: tuple[Entry, ...]
    started: tuple[Started, ...]
    resumed: tuple[Resumed, ...] = ()

    @property
    def num_decode_tokens(self) -> int:
        return sum(self.decodes)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(self.counts) - self.num_decode_tokens

    @property
    def num_draft_tokens(self) -> int:
        return sum(entry.num_drafts for entry in self.entries)


class Scheduler:
    """Not thread-safe.  Between ``plan`` and its ``complete`` the planned sequences keep their blocks, whoever aborts
    them: a step in flight writes into them.  Two plans may be open, to be completed in their order."""

    def __init__(self, pool: BlockPool, limits: Limits, host: HostTier | None = None) -> None:
        """``host``: of ``pool``; None is one without room."""
        self.pool = pool
        self.limits = limits
        self.host = host or HostTier(pool, 0)
        # A sequence that shares the pool with pins alone must be able to end: no deadlock, however long its answer.
        self.max_length = min(limits.context_length, (pool.num_blocks - limits.max_pinned) * limits.block_size)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._loads: dict[int, Sequence] = {}  # by the copy from the host that it waits for
        self._delivered: set[SequenceId] = set()  # and in no plan since
        self._arrived: deque[Sequence] = deque()  # that copy has ended, not told to have started yet
        self._ready: deque[Sequence] = deque()  # KV delivered, no place in the batch yet
        self._running: list[Sequence] = []  # by age
        self._open: deque[Plan] = deque()
        self._num_reserved = 0
        self._answer_lengths = AnswerLengths()

    @property
    def num_running(self) -> int:
        """Those that wait for a copy from the host among them."""
        return len(self._running) + len(self._ready) + len(self._arrived) + self._num_loading

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def num_queued_prefill_tokens(self) -> int:
        loading = (s for s in self._loads.values() if s.stage is Stage.LOADING)
        queued = (*self._waiting, *self._running, *self._arrived, *loading)
        return sum(s.num_to_compute for s in queued if s.num_to_compute > 1)

    @property
    def num_spare_blocks(self) -> int:
        """That can be had without taking what those who run or wait count on."""
        return max(0, self.pool.num_available - self._num_kept())

    @property
    def num_growth_blocks(self) -> int:
        """How many blocks those who run, wait or are reserved for are expected to take beyond what they hold or is lent for
        them."""
        return peak_growth(map(self._growing, self._sequences.values()), self.limits.block_size)

    @property
    def num_expected_answer_tokens(self) -> int:
        """Of an answer that has not begun and may be of any length."""
        return self._answer_lengths.expected(0, self.max_length)

    def get(self, id_: SequenceId) -> Sequence | None:
        return self._sequences.get(id_)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence whose prompt is to be computed here."""
        self._check_fits(sequence)
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting already")
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)

    def reserve(self, sequence: Sequence) -> tuple[int, list[int]]:
        """Makes room for a prompt that a writer will deliver: (index of the first block to write, blocks lent).  Blocks
        before it are in the prefix cache already, or on their way from the host.  The lent blocks belong to the caller's
        ticket, and come back by ``deliver`` or, after ``abort``, by way of the pool's quarantine.  Raises OutOfBlocksError
        or NeverFitsError."""
        self._check_fits(sequence)
        self._extend_chain(sequence)
        cached, num_on_host = self._find(sequence.chain[1:])
        self.pool.acquire(cached)
        need = self._num_blocks(sequence.num_prompt) - len(cached)
        try:
            self._check_room(need)
        except OutOfBlocksError:
            self.pool.release(cached)
            raise
        fresh = self.pool.allocate(num_on_host)
        lent = self.pool.lend(need - num_on_host)
        self._num_reserved += 1
        sequence.stage = Stage.RESERVED
        self._sequences[sequence.id] = sequence
        self._place(sequence, cached, fresh, num_on_host)
        sequence.num_cached = sequence.num_computed
        return len(sequence.block_table), lent

    def deliver(self, id_: SequenceId, lent: list[int], first_token: Drawn) -> list[Event]:
        """The writer of ``lent`` has committed: the prompt's KV is here and its first token drawn."""
        sequence = self._sequences[id_]
        assert sequence.stage is Stage.RESERVED
        self._num_reserved -= 1
        self.pool.settle(lent)
        sequence.block_table = sequence.block_table + lent
        if sequence.num_computed == sequence.num_cached:  # or else a copy failed, and all behind it is computed again
            sequence.num_computed = sequence.num_prompt
        sequence.stage = Stage.RUNNING
        if not sequence.is_loading:
            self._remember(sequence)
        event = self._append(sequence, first_token)
        if sequence.stage is not Stage.ENDED:
            self._delivered.add(id_)
            if not sequence.is_loading:
                self._ready.append(sequence)
        return [event]

    def copied(self, copy: Copy, *, ok: bool) -> None:
        """A copy of the host tier was made, or failed: nothing of it is read or written any more."""
        self.host.end(copy, ok=ok)
        sequence = self._loads.pop(copy.id, None)
        if sequence is None:
            return
        sequence.is_loading = False
        if not ok:
            sequence.num_computed = sequence.num_remembered * self.limits.block_size
        match sequence.stage:
            case Stage.ENDED:
                self._forget_once_free(sequence)
                return
            case Stage.LOADING:
                self._arrived.append(sequence)
            case Stage.RUNNING:  # delivered meanwhile
                self._ready.append(sequence)
        self._remember(sequence)

    def abort(self, id_: SequenceId) -> None:
        """Ends a sequence at any stage; its blocks go back now, or after the step or copy in flight.  Unknown ids are
        ignored.  Blocks lent to a writer are the ticket's business."""
        sequence = self._sequences.get(id_)
        if sequence is None:
            return
        sequence.aborted = True
        if sequence.num_steps == 0:
            self._end(sequence)

    def halt(self, id_: SequenceId) -> None:
        """Computes no more of a sequence but keeps its blocks, which a transfer may still be reading; ``abort`` releases
        them.  Unknown ids are ignored."""
        sequence = self._sequences.get(id_)
        if sequence is not None:
            self._leave_queues(sequence)
            sequence.stage = Stage.HELD

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can be computed, or not before the one under way is completed.  Running
        sequences come first, single tokens before chunks, so that a long prompt delays the others by one chunk at most."""
        assert len(self._open) < MOST_OPEN, "the step before the last was not completed"
        if any(s.num_awaited and s.drafter is not None for s in self._running):
            return None  # what to guess depends on the token to come
        started = []
        self._fill_from_ready()
        if not self._grow():
            return None
        while self._ready and self._has_place:  # a preemption made a place
            self._fill_from_ready()
            if not self._grow():
                return None
        while self._arrived:  # its place was kept
            started.append(self._start(self._arrived.popleft()))
        started += self._start_waiting()
        budget = prompt_budget = self.limits.max_step_tokens
        chosen: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._running, key=lambda s: s.num_to_compute > 1):  # stable: age within each kind
            if self._is_over(sequence):
                continue
            count = min(sequence.num_to_compute, budget)
            if count > 1:
                count = min(count, prompt_budget)
                prompt_budget -= count
            elif sequence.num_to_come > sequence.num_prompt and self.limits.max_mixed_tokens:
                prompt_budget = self.limits.max_mixed_tokens
            if count == 0:
                break
            budget -= count
            chosen.append((sequence, count))
        if not chosen:
            return None
        drafts = self._draft(chosen)
        if self.limits.look_ahead:
            self._look_ahead(chosen)
        plan = Plan(
            sequences=tuple(s for s, _ in chosen),
            counts=tuple(n for _, n in chosen),
            decodes=tuple(n == 1 and s.num_to_come > s.num_prompt for s, n in chosen),
            entries=tuple(self._entry(s, n, drafts.get(s.id, [])) for s, n in chosen),
            started=tuple(started),
            resumed=self._resumed(chosen),
        )
        self._open_plan(plan)
        return plan

    def complete(self, plan: Plan, drawn: Sequence_[Drawn | DrawFailed | None]) -> list[Event]:
        """Takes the step's result; ``drawn`` holds ``num_samples`` tokens for each entry, in order.  Those behind a draft
        that is not what was drawn for its place do not count, and may be None."""
        self._close_plan(plan)
        events: list[Event] = []
        draws = iter(drawn)
        for sequence, count, entry in zip(plan.sequences, plan.counts, plan.entries, strict=True):
            tokens = list(islice(draws, entry.num_samples))
            if sequence.aborted:
                self._end(sequence)
                continue
            if sequence.stage is not Stage.RUNNING:
                continue  # halted, or at its end, before the step was done
            sequence.num_computed += count
            self._remember(sequence)
            if sequence.num_output == 0:
                sequence.num_chunks += 1
                events.append(ChunkComputed(sequence.id, sequence.num_computed))
            events += self._take(sequence, entry, tokens)
        return events

    def fail(self, plan: Plan, message: str) -> list[Event]:
        """The step could not be computed: its sequences end, those that only started with it do not.  Prefill-only ones
        keep their blocks until ``abort``, for a transfer may still be reading them."""
        self._close_plan(plan)
        for sequence in plan.sequences:
            if sequence.aborted:
                self._end(sequence)
        return [self._fail(s, message) for s in plan.sequences if s.stage is Stage.RUNNING]

    def check_integrity(self, pinned: Mapping[int, int] = MappingProxyType({})) -> None:
        """Raises AssertionError unless each ACTIVE block's references equal the block tables that name it and the
        ``pinned`` references on it, which no sequence has: pins' and pulls'."""
        self.pool.check_integrity()
        self.host.check_integrity()
        assert self._delivered <= self._sequences.keys(), "one that has ended is still to go on"
        loads = self.host.loads()
        assert loads.keys() == self._loads.keys(), "the copies up are not those that sequences wait for"
        for id_, sequence in self._loads.items():
            assert sequence.is_loading, f"{sequence.id} does not wait for its copy"
            assert set(loads[id_].blocks) <= set(sequence.block_table), (
                f"{sequence.id} lost blocks that are copied into"
            )
        held = dict(pinned)
        for sequence in self._sequences.values():
            for block in sequence.block_table:
                held[block] = held.get(block, 0) + 1
        assert held == self.pool.references(), "references differ from the block tables and pins"

    def _resumed(self, chosen: list[tuple[Sequence, int]]) -> tuple[Resumed, ...]:
        if not self._delivered:
            return ()
        # Not who has to compute its prompt again, in several steps, before it goes on.
        resumed = [s.id for s, count in chosen if s.id in self._delivered and count == s.num_to_compute]
        self._delivered.difference_update(resumed)
        return tuple(map(Resumed, resumed))

    def _open_plan(self, plan: Plan) -> None:
        num_samples = 0
        for sequence, count, entry in zip(plan.sequences, plan.counts, plan.entries, strict=True):
            sequence.num_steps += 1
            sequence.num_in_steps += count
            if entry.sampling is not None:
                sequence.num_awaited += 1
                sequence.awaited_sample = num_samples
            num_samples += entry.num_samples
        self._open.append(plan)

    def _close_plan(self, plan: Plan) -> None:
        oldest = self._open.popleft()  # not within the assert, which may be compiled away
        assert oldest is plan, "steps are completed in their order"
        for sequence, count, entry in zip(plan.sequences, plan.counts, plan.entries, strict=True):
            sequence.num_steps -= 1
            sequence.num_in_steps -= count
            sequence.num_awaited -= entry.sampling is not None
            if sequence.stage is Stage.ENDED:
                self._forget_once_free(sequence)

    def _is_over(self, sequence: Sequence) -> bool:
        """Whether the token that is awaited is its last, whatever it is."""
        if sequence.aborted:
            return True
        return sequence.num_awaited > 0 and (
            sequence.prefill_only
            or sequence.num_to_come - sequence.num_prompt >= sequence.max_tokens
            or sequence.num_to_come >= self.max_length
        )

    def _check_fits(self, sequence: Sequence) -> None:
        if sequence.num_prompt >= self.max_length:
            raise NeverFitsError(
                f"the prompt has {sequence.num_prompt} tokens; this worker holds prompt and answer of {self.max_length} "
                f"tokens in all, so shorten the prompt or give the worker more KV memory"
            )

    def _growing(self, sequence: Sequence) -> Growing:
        num_tokens, num_blocks = len(sequence.tokens), len(sequence.block_table)
        match sequence.stage:
            case Stage.HELD | Stage.ENDED:
                return Growing(num_blocks, 0, 0)
            case Stage.RESERVED:
                num_blocks = self._num_blocks(num_tokens)
        most = min(sequence.max_tokens, self.max_length - sequence.num_prompt)
        if sequence.prefill_only or sequence.num_output >= most:
            return Growing(num_blocks, num_tokens, 0)
        num_expected = self._answer_lengths.expected(sequence.num_output, most)
        # The last token is drawn and nothing behind it is computed: it needs no slot.
        return Growing(num_blocks, num_tokens, num_expected - sequence.num_output - 1)

    def _check_room(self, need: int) -> None:
        """A reservation must not take what others count on: a block for each sequence that grows, and what the first in
        the queue waits for.  Otherwise a stream of reservations would starve them for ever."""
        kept = self._num_kept()
        if need + kept > self.pool.num_available:
            raise OutOfBlocksError(
                f"{need} blocks asked for; {self.pool.num_available} of {self.pool.num_blocks} are available and {kept} of "
                f"them are kept for requests that run or wait"
            )

    def _num_kept(self) -> int:
        kept = self.num_running + self._num_reserved
        if self._waiting and self._has_place:
            kept += self._num_blocks(len(self._waiting[0].tokens))
        return kept

    @property
    def _num_loading(self) -> int:
        """Those that would run if it were not for their copy."""
        return sum(s.stage in (Stage.LOADING, Stage.RUNNING) for s in self._loads.values())

    @property
    def _has_place(self) -> bool:
        return len(self._running) + len(self._arrived) + self._num_loading < self.limits.max_running

    def take_cache_changes(self) -> list[CacheChange]:
        """What entered and left the cache, of either tier, since the last call; in order within a tier."""
        changes = self.pool.take_changes()
        self.host.note(changes)
        return [*self.host.take_changes(), *changes]

    def _start_waiting(self) -> list[Started]:
        """In their order; but one whose next block is being copied for another stays for so long, to share it, and holds up
        nobody."""
        started = []
        for sequence in list(self._waiting):
            if not self._has_place:
                break
            self._extend_chain(sequence)
            # The last token is always computed: its logits are what the next token is drawn from.
            usable = (len(sequence.tokens) - 1) // self.limits.block_size
            cached, num_on_host = self._find(sequence.chain[1 : usable + 1])
            if num_on_host and self.host.is_loading(sequence.chain[len(cached) + 1]):
                continue
            if not self._try_place(sequence, cached, num_on_host):
                break
            self._waiting.remove(sequence)
            if not sequence.is_loading:
                started.append(self._start(sequence))
        return started

    def _try_place(self, sequence: Sequence, cached: list[int], num_on_host: int) -> bool:
        """Gives it its blocks, and has copied up what the host has of them.  False where there are too few."""
        self.pool.acquire(cached)
        need = self._num_blocks(len(sequence.tokens)) - len(cached)
        # A block in hand for each running sequence: starting one more must not preempt another at once.
        num_running = self.num_running
        if num_running and need + num_running > self.pool.num_available:
            self.pool.release(cached)
            return False
        try:
            fresh = self.pool.allocate(need)
        except OutOfBlocksError:
            self.pool.release(cached)
            return False
        self._place(sequence, cached, fresh, num_on_host)
        sequence.stage = Stage.LOADING
        return True

    def _find(self, hashes: Sequence_[bytes]) -> tuple[list[int], int]:
        """The blocks of the longest prefix in the pool, and how many behind it the host has.  What the pool has behind
        these is not used: should the copy fail, it would be computed again, in blocks that others read."""
        cached = self.pool.match(hashes)
        rest = islice(hashes, len(cached), None)
        return cached, sum(1 for _ in takewhile(self.host.holds, rest))

    def _place(self, sequence: Sequence, cached: list[int], fresh: list[int], num_on_host: int) -> None:
        """``fresh`` follow ``cached``; the first ``num_on_host`` of them are to be copied into."""
        sequence.block_table = cached + fresh
        sequence.num_remembered = len(cached)
        num_found = len(cached) + num_on_host
        sequence.num_computed = num_found * self.limits.block_size
        if num_on_host:
            copy = self.host.load(sequence.chain[len(cached) + 1 : num_found + 1], fresh[:num_on_host])
            self._loads[copy.id] = sequence
            sequence.is_loading = True

    def _start(self, sequence: Sequence) -> Started:
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
        sequence.stage = Stage.RUNNING
        self._running.append(sequence)
        return Started(sequence.id, tuple(sequence.block_table), sequence.num_computed)

    def _fill_from_ready(self) -> None:
        while self._ready and self._has_place:
            self._running.append(self._ready.popleft())

    def _grow(self) -> bool:
        """Gives each running sequence the block its next token needs, oldest first, preempting the youngest for it.  False
        when that must wait for the step under way, which needs the blocks of all that are in it, or for a copy from the
        host, whose sequence is among the youngest."""
        for sequence in list(self._running):
            if sequence.stage is not Stage.RUNNING:
                continue  # preempted a moment ago for an older one
            while not self._is_over(sequence) and len(sequence.block_table) < self._num_blocks(sequence.num_to_come):
                try:
                    sequence.block_table += self.pool.allocate(1)
                except OutOfBlocksError:
                    if self._open or self._loads:
                        return False
                    # Not a prefill-only one: its blocks may be the source of a transfer.
                    victim = next(s for s in reversed([*self._running, *self._arrived]) if not s.prefill_only)
                    self._preempt(victim)
                    if victim is sequence:
                        break
        return True

    def _look_ahead(self, chosen: list[tuple[Sequence, int]]) -> None:
        for sequence, count in chosen:
            full = len(sequence.block_table) * self.limits.block_size == len(sequence.tokens)
            if full and count == 1 and sequence.num_output and self.num_spare_blocks:
                sequence.block_table += self.pool.allocate(1)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_queues(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = sequence.num_remembered = 0
        sequence.num_preemptions += 1
        sequence.stage = Stage.WAITING
        self._waiting.appendleft(sequence)

    def _draft(self, chosen: list[tuple[Sequence, int]]) -> dict[SequenceId, list[int]]:
        """What is guessed to follow the sequences that decode, as far as rows of the step and blocks are to spare: whoever
        runs, waits or reserves goes first."""
        num_rows = sum(count for _, count in chosen)
        room = min(self.limits.max_draft_rows, self.limits.max_step_tokens) - num_rows
        if room <= 0:
            return {}
        proposed = []
        for sequence, _ in chosen:
            if sequence.drafter is not None and sequence.num_output and sequence.num_to_compute == 1:
                # One token is drawn behind the last draft.
                most = min(sequence.max_tokens - sequence.num_output, self.max_length - len(sequence.tokens)) - 1
                proposed.append((sequence, sequence.drafter.propose(sequence.tokens, min(most, room))))
        given = share_out([len(tokens) for _, tokens in proposed], room)
        drafts = {}
        for (sequence, tokens), count in zip(proposed, given, strict=True):
            drafts[sequence.id] = tokens[: self._make_room(sequence, count)]
        return drafts

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """For how many of ``count`` drafts there is a place; takes the blocks for them."""
        num_tokens, block_size = len(sequence.tokens), self.limits.block_size
        need = self._num_blocks(num_tokens + count) - len(sequence.block_table)
        sequence.block_table += self.pool.allocate(max(0, min(need, self.num_spare_blocks)))
        return min(count, len(sequence.block_table) * block_size - num_tokens)

    def _entry(self, sequence: Sequence, count: int, drafts: list[int]) -> Entry:
        start = sequence.num_scheduled
        last = start + count == sequence.num_to_come
        tokens = sequence.tokens[start : start + count]
        if len(tokens) < count:
            tokens = [*tokens, awaited_token(sequence.awaited_sample)]
        return Entry(tokens + drafts, start, sequence.block_table, sequence.sampling if last else None, len(drafts))

    def _take(self, sequence: Sequence, entry: Entry, drawn: Sequence_[Drawn | DrawFailed | None]) -> list[Event]:
        """Appends what was drawn, up to and including the first token that is not what was drafted for its place: behind it
        the logits are of another text."""
        events: list[Event] = []
        for token, draft in zip(drawn, (*entry.drafts, None), strict=False):
            if isinstance(token, DrawFailed):
                events.append(self._fail(sequence, token.message))
                break
            assert token is not None
            events.append(self._append(sequence, token))
            if token.token_id != draft or sequence.stage is not Stage.RUNNING:
                break
            sequence.num_computed += 1  # the draft's KV is the token's
            self._remember(sequence)
        if sequence.drafter is not None and entry.num_drafts:
            num_accepted = sum(isinstance(event, TokenDrawn) for event in events[1:])
            sequence.num_drafted += entry.num_drafts
            sequence.num_accepted += num_accepted
            sequence.drafter.learn(len(sequence.tokens), entry.num_drafts, num_accepted)
            self._trim(sequence)
        return events

    def _trim(self, sequence: Sequence) -> None:
        """Gives back the blocks that only refused drafts needed."""
        kept = self._num_blocks(len(sequence.tokens))
        self.pool.release(sequence.block_table[kept:])
        sequence.block_table = sequence.block_table[:kept]

    def _append(self, sequence: Sequence, drawn: Drawn) -> TokenDrawn:
        sequence.tokens.append(drawn.token_id)
        finish = None
        if drawn.token_id in sequence.stop_ids:
            finish = FinishReason.STOP
        elif sequence.num_output >= sequence.max_tokens or len(sequence.tokens) >= self.max_length:
            finish = FinishReason.LENGTH
        event = TokenDrawn(sequence.id, sequence.num_output - 1, drawn, finish)
        if sequence.prefill_only:
            self._running.remove(sequence)
            sequence.stage = Stage.HELD
        elif finish is not None:
            self._end(sequence)
        return event

    def _fail(self, sequence: Sequence, message: str) -> StepFailed:
        if sequence.prefill_only:
            self.halt(sequence.id)
        else:
            self._end(sequence)
        return StepFailed(sequence.id, message)

    def _end(self, sequence: Sequence) -> None:
        if sequence.stage is Stage.ENDED:
            return
        self._num_reserved -= sequence.stage is Stage.RESERVED
        if sequence.num_output and not sequence.prefill_only:
            self._answer_lengths.ended(sequence.num_output)
        sequence.stage = Stage.ENDED
        self._delivered.discard(sequence.id)
        self._leave_queues(sequence)
        self._forget_once_free(sequence)

    def _forget_once_free(self, sequence: Sequence) -> None:
        """Gives back the blocks of one that has ended, unless a step or a copy still writes into them."""
        if sequence.num_steps or sequence.is_loading:
            return
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        del self._sequences[sequence.id]

    def _leave_queues(self, sequence: Sequence) -> None:
        for queue in (self._running, self._waiting, self._ready, self._arrived):
            if sequence in queue:
                queue.remove(sequence)

    def _extend_chain(self, sequence: Sequence) -> None:
        known = (len(sequence.chain) - 1) * self.limits.block_size
        sequence.chain += extend_chain(sequence.chain[-1], sequence.tokens[known:], self.limits.block_size)

    def _remember(self, sequence: Sequence) -> None:
        full = sequence.num_computed // self.limits.block_size
        if full == sequence.num_remembered:
            return
        self._extend_chain(sequence)
        for i in range(sequence.num_remembered, full):
            self.pool.remember(sequence.block_table[i], sequence.chain[i + 1])
        sequence.num_remembered = full

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)
