"""Dynamo's mocker (ai-dynamo-runtime, `run_mocker_trace_replay`) and the plan's simulator on the same requests, with the
one timing model that both take: steps that compute prompts take so long, and steps that decode, whatever they hold."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.planner.fleet import AT_ONCE, Fleet, Link, Pool, simulate
from services.planner.simulator.cost_model import CostModel
from services.planner.sizing import fewest
from services.planner.step_cost import calibrated
from services.planner.traffic import Traffic

PREFILL_S, DECODE_S = 0.3, 0.012
STEP_TOKENS, MAX_RUNNING, BLOCK, NUM_BLOCKS = 8192, 256, 512, 1000
TTFT_S, TPOT_S, SHARE = 1.0, 0.02, 0.9
MOST = 64
PLENTY = 64
NUM_REQUESTS, RATE = 1000, 16.0


@dataclass(frozen=True, slots=True)
class Size:
    """``num_prefill`` 0: colocated."""

    num_prefill: int
    num_decode: int

    def __str__(self) -> str:
        return f"{self.num_prefill} + {self.num_decode}" if self.num_prefill else f"{self.num_decode} colocated"


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds; ``good``: share that keeps the objectives."""

    good: float
    ttft_p50: float
    ttft_p90: float
    tpot_p50: float
    tpot_p90: float
    cpu_s: float


SIZES = (Size(0, 16), Size(8, 4), Size(6, 2))
Simulator = Callable[[Traffic, Size], Answer]


def ours(traffic: Traffic, size: Size) -> Answer:
    """Split, the peer's timing to the letter.  Colocated the nearest to it of costs that are sums: a prompt of mean length
    takes what the peer's step takes, two in one step twice that."""
    kv_tokens = NUM_BLOCKS * BLOCK
    split = size.num_prefill > 0
    chunk = calibrated(CostModel(PREFILL_S, 0, 0, 0, 0, 0, 1e18))
    steps = calibrated(
        CostModel(DECODE_S, 0 if split else PREFILL_S / float(traffic.num_input.mean()), 0, 0, 0, 0, 1e18)
    )
    decode = Pool(size.num_decode, steps, STEP_TOKENS, kv_tokens, MAX_RUNNING)
    fleet = Fleet(decode, gateway=AT_ONCE)
    if split:
        prefill = Pool(size.num_prefill, chunk, STEP_TOKENS, kv_tokens, MAX_RUNNING)
        fleet = Fleet(decode, prefill, Link(0.0, 1.0, 1.0, 0.0), AT_ONCE)
    began_s = time.process_time()
    run = simulate(fleet, traffic)
    return _answer(run.ttft_s, run.tpot_s, time.process_time() - began_s)


def theirs(replay: Callable[..., Any], trace: Path) -> Simulator:
    def run(traffic: Traffic, size: Size) -> Answer:
        path = trace.with_suffix(".replayed.jsonl")
        _write(path, traffic)
        sized = (
            {"prefill_engine_args": _engine("prefill"), "decode_engine_args": _engine("decode"),
             "num_prefill_workers": size.num_prefill, "num_decode_workers": size.num_decode}
            if size.num_prefill
            else {"extra_engine_args": _engine("aggregated"), "num_workers": size.num_decode}
        )  # fmt: skip
        began_s = time.process_time()
        result = replay(
            [str(path)], trace_block_size=BLOCK, capture_per_request=True, capture_planner_details=False, **sized
        )
        took_s = time.process_time() - began_s
        rows = [row for row in result.per_request if row["terminal_status"] == "completed"]
        if len(rows) != len(traffic):
            raise RuntimeError(f"the peer answered {len(rows)} of {len(traffic)} requests")
        ttft_s = np.array([row["ttft_ms"] for row in rows]) / 1e3
        e2e_s = np.array([row["e2e_latency_ms"] for row in rows]) / 1e3
        gaps = np.maximum(1, np.array([row["output_length"] for row in rows]) - 1)
        return _answer(ttft_s, (e2e_s - ttft_s) / gaps, took_s)

    return run


def fewest_workers(simulator: Simulator, traffic: Traffic) -> tuple[Size | None, Size | None]:
    """Colocated, and split: as many of each role as it takes while the other has ``PLENTY``."""

    def needed(sized: Callable[[int], Size]) -> int | None:
        return fewest(lambda count: simulator(traffic, sized(count)).good >= SHARE, 8, MOST)

    colocated = needed(lambda n: Size(0, n))
    prefill, decode = needed(lambda n: Size(n, PLENTY)), needed(lambda n: Size(PLENTY, n))
    return (
        None if colocated is None else Size(0, colocated),
        None if prefill is None or decode is None else Size(prefill, decode),
    )


def _engine(role: str) -> dict[str, Any]:
    return {
        "engine": {
            "worker_type": role, "block_size": BLOCK, "num_gpu_blocks": NUM_BLOCKS, "max_num_seqs": MAX_RUNNING,
            "max_num_batched_tokens": STEP_TOKENS, "enable_prefix_caching": False,
            "timing_model": {"type": "fixed", "prefill_ms": PREFILL_S * 1e3, "decode_ms": DECODE_S * 1e3},
        }
    }  # fmt: skip


def _write(path: Path, traffic: Traffic) -> None:
    """Mooncake's lines, of prompts that share nothing."""
    lines, block = [], 0
    for at_s, num_input, num_output in zip(traffic.arrive_s, traffic.num_input, traffic.num_output, strict=True):
        count = -(-int(num_input) // BLOCK)
        lines.append(
            json.dumps({"timestamp": round(float(at_s) * 1e3), "input_length": int(num_input),
                        "output_length": int(num_output), "hash_ids": list(range(block, block + count))})
        )  # fmt: skip
        block += count
    path.write_text("\n".join(lines) + "\n")


def _answer(ttft_s: Any, tpot_s: Any, cpu_s: float) -> Answer:
    good = float(((ttft_s <= TTFT_S) & (tpot_s <= TPOT_S)).mean())
    figures = (float(np.percentile(each, rank)) for each in (ttft_s, tpot_s) for rank in (50, 90))
    return Answer(good, *figures, cpu_s)
