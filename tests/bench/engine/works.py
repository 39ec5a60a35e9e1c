"""What is measured of one format on so many threads."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from services.engine.blocks import BlockPool
from services.engine.hashing import chain_root
from services.engine.model_files import ModelFiles
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Sequence, SequenceId, TokenDrawn
from tests.bench.engine import accounts, host
from tests.bench.engine.engines import BLOCK_SIZE, CHUNK, GREEDY, Engine, Ours
from tests.bench.engine.limits import Memory, matmul_seconds
from tests.bench.engine.rows import Row, compared, in_turn

BATCHES, CONTEXTS, PROMPTS = (1, 4, 8, 16), (128, 512, 2048), (512, 2048)
READ_NBYTES = 256 << 20
MAX_PREFILL_ROUNDS = 5

# Of peers, by the beginning of their names.
DECODE_GOALS = {"transformers": 5.0, "llama.cpp": 0.9}
BATCHED_GOALS = {"llama.cpp": 2.0}
PREFILL_GOALS = {"transformers": 1.7, "llama.cpp": 3.0}


@dataclass(frozen=True, slots=True)
class Setting:
    files: ModelFiles
    memory: Memory
    peers: Mapping[str, Engine]
    threads: int
    rounds: int

    def read(self) -> float:
        """Seconds for a byte, in order."""
        piece = 1 << 20
        return self.memory.read(np.arange(READ_NBYTES // piece) * piece, piece, self.threads) / READ_NBYTES

    def read_scattered(self, ours: Ours) -> float:
        """Seconds for a byte of KV: keys and values of one layer lie together for one block."""
        layout = ours.layout
        piece = layout.block_nbytes // layout.num_layers
        blocks = np.random.default_rng(1).permutation((1 << 30) // layout.block_nbytes)
        offsets = (blocks[None, :] * layout.block_nbytes + np.arange(layout.num_layers)[:, None] * piece).reshape(-1)
        return self.memory.read(offsets, piece, self.threads) / (len(offsets) * piece)


class Works:
    """Each takes minutes or less and returns its rows."""

    def __init__(self, setting: Setting, dtype: str) -> None:
        torch.set_num_threads(setting.threads)
        self._setting = setting
        self._dtype = dtype
        self._ours = Ours(setting.files, dtype, setting.threads)
        self._eager = None if dtype == "int8" else Ours(setting.files, dtype, setting.threads, torch_only=True)
        self._on = f"{dtype}, {setting.threads} threads" if setting.threads > 1 else f"{dtype}, 1 thread"

    def decode(self) -> list[Row]:
        return [row for batch in BATCHES for context in CONTEXTS for row in self._step(batch, context)]

    def growth(self) -> list[Row]:
        """What 2048 tokens of context cost over 128, against the reading of the KV between."""
        setting, ours = self._setting, self._ours
        nbytes = 8 * (2048 - 128) * ours.layout.block_nbytes // ours.layout.block_size
        taken = in_turn(
            {
                "short": lambda: ours.decode(8, 128),
                "long": lambda: ours.decode(8, 2048),
                "in order": lambda: setting.read() * nbytes,
                "as blocks lie": lambda: setting.read_scattered(ours) * nbytes,
            },
            setting.rounds,
        )
        grown = [long - short for short, long in zip(taken["short"], taken["long"], strict=True)]
        what = f"decode {self._on}, batch 8, context 2048 over 128 against its KV bytes"
        return [compared(f"{what} {name}", grown, taken[name], 0.8) for name in ("in order", "as blocks lie")]

    def prefill(self) -> list[Row]:
        return [row for length in PROMPTS for row in self._prompt(length)]

    def prefix(self) -> list[Row]:
        """A prompt of which all is cached but its last block, through the scheduler, against one of which nothing is."""
        rng, ours = np.random.default_rng(3), self._ours
        limits = Limits(BLOCK_SIZE, context_length=4096, max_step_tokens=CHUNK)
        scheduler = Scheduler(BlockPool(ours.num_blocks), limits)
        prompts: list[list[int]] = []

        def first_token(prompt: list[int]) -> float:
            root = [chain_root(self._setting.files.config.revision)]
            began = time.perf_counter()
            scheduler.add(Sequence(SequenceId("prefix"), list(prompt), GREEDY, 1, frozenset(), root))
            while (plan := scheduler.plan()) is not None:
                drawn = ours.run(plan.entries).draws
                if any(isinstance(event, TokenDrawn) for event in scheduler.complete(plan, drawn)):
                    break
            return time.perf_counter() - began

        def miss() -> float:
            prompts.append(rng.integers(10, 20_000, 2048).tolist())
            return first_token(prompts[-1])

        taken = in_turn({"miss": miss, "hit": lambda: first_token(prompts[-1])}, self._setting.rounds)
        return [
            compared(f"prefill {self._on}, 2048 tokens, a prefix hit against a miss", taken["hit"], taken["miss"], 10.0)
        ]

    def host(self) -> list[Row]:
        return host.measure(self._ours, self._setting.files.config.revision, self._setting.rounds, self._on)

    def accounts(self) -> list[Row]:
        return accounts.measure(self._ours, self._setting.files.config, self._setting.rounds, self._on)

    def _step(self, batch: int, context: int) -> list[Row]:
        setting, ours, eager = self._setting, self._ours, self._eager
        nbytes = ours.weights_nbytes + batch * context * ours.layout.block_nbytes // ours.layout.block_size
        work = f"decode {self._on}, batch {batch}, context {context}"
        first, batched = (batch, context) == (1, 128), (batch in (8, 16) and context == 512)
        inside: list[float] = []

        def step() -> float:
            seconds = ours.decode(batch, context)
            inside.append(ours.inside_s / seconds)
            return seconds

        calls: dict[str, Callable[[], float]] = {"ours": step, "read": lambda: setting.read() * nbytes}
        if eager is not None:
            calls["eager torch"] = lambda: eager.decode(batch, context)
        if first or batched:
            calls |= {name: lambda peer=peer: peer.decode(batch, context) for name, peer in setting.peers.items()}  # type: ignore[misc]
        taken = in_turn(calls, setting.rounds)
        own = taken.pop("ours")
        rows = [compared(f"{work} against its bytes", own, taken.pop("read"), 0.65 if first else None)]
        goals = DECODE_GOALS if first else BATCHED_GOALS
        rows += [compared(f"{work} against {name}", own, took, _goal(goals, name)) for name, took in taken.items()]
        if first:
            share = statistics.median(inside)
            rows.append(Row(f"{work}: share inside the kernels", share, 1.0, round(share, 3), 0.85, "of a step"))
        return rows

    def _prompt(self, length: int) -> list[Row]:
        setting, ours, eager = self._setting, self._ours, self._eager
        config = setting.files.config
        prompt = np.random.default_rng(2).integers(10, 20_000, length).tolist()
        hidden, inner, size = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        weights = hidden * (2 * size + 2 * config.num_kv_heads * config.head_dim + 3 * inner)
        attention = size * length  # half of length x length, twice
        macs = config.num_layers * length * (weights + attention)
        kind = torch.float32 if self._dtype == "float32" else torch.bfloat16

        def at_matmul_rate() -> float:
            taken = matmul_seconds(2 * CHUNK, inner, inner, kind, setting.threads)
            return taken * macs / (2 * CHUNK * inner * inner)

        calls: dict[str, Callable[[], float]] = {"ours": lambda: ours.prefill(prompt), "matmul": at_matmul_rate}
        if eager is not None:
            calls["eager torch"] = lambda: eager.prefill(prompt)
        calls |= {name: lambda peer=peer: peer.prefill(prompt) for name, peer in setting.peers.items()}  # type: ignore[misc]
        taken = in_turn(calls, min(setting.rounds, MAX_PREFILL_ROUNDS))
        own, work = taken.pop("ours"), f"prefill {self._on}, {length} tokens"
        rows = [compared(f"{work} at the rate of matmul", own, taken.pop("matmul"), 0.65)]
        return rows + [
            compared(f"{work} against {name}", own, took, _goal(PREFILL_GOALS, name)) for name, took in taken.items()
        ]


def thread_counts() -> list[int]:
    """All that this process may use, and one."""
    return sorted({1, len(os.sched_getaffinity(0))}, reverse=True)


def _goal(goals: Mapping[str, float], name: str) -> float | None:
    return next((goal for start, goal in goals.items() if name.startswith(start)), None)
