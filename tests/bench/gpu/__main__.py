"""make bench-gpu, on one NVIDIA GPU: decode steps against the time that their bytes take, prefill against the time of its
sums, KV between two processes against a copy, and in clusters of real processes TTFT split against one worker, and the gaps
of streams beside long prompts against without.

With --rehearse what needs no kernels runs on the CPU, with shorter prompts: to see that it runs, not to measure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from services.engine.model_config import ModelConfig
from tests.bench.gpu import phases, steps, transfer
from tests.bench.gpu.floors import SHAPES, decode_nbytes, prefill_flops
from tests.bench.gpu.rows import Row, write_json, write_png
from tests.gpu.conftest import why_not

BATCHES, CONTEXTS, PROMPTS = (1, 16, 64, 256), (512, 4096), (512, 2048, 8192)
NUM_BLOCKS = 128
REHEARSED = phases.Load(num_streams=4, num_prompt=32, num_answer=256, num_long=400)
MOST_KV_SHARE = 0.6  # of the GPU's memory; combinations beyond are left out, and named


def measure(config: ModelConfig, rounds: int, rates: tuple[float, float], place: torch.device) -> list[Row]:
    copied_per_s, flops_per_s = rates
    limit = torch.cuda.get_device_properties(place).total_memory * MOST_KV_SHARE
    pairs = [(batch, context) for batch in BATCHES for context in CONTEXTS]
    fitting = [pair for pair in pairs if decode_nbytes(config, *pair) < limit]
    for batch, context in sorted(set(pairs) - set(fitting)):
        print(f"{config.name}: batch {batch} of context {context} does not fit this GPU")
    num_tokens = [batch * context for batch, context in fitting] + list(PROMPTS)
    runner = steps.make_runner(config, max(num_tokens) // steps.BLOCK_SIZE, max(BATCHES), place)
    runner.warm_up()
    rows = []
    for batch, context in fitting:
        step = steps.decode_batch(batch, context)
        took_s = steps.median_s(lambda step=step: runner.run(step), rounds, place)
        floor_s = decode_nbytes(config, batch, context) / copied_per_s
        rows.append(Row(f"{config.name} decode {batch} x {context}", took_s, floor_s))
    for num_tokens in (n for n in PROMPTS if n <= config.context_length):
        prompt = steps.prefill_batch(num_tokens)
        took_s = steps.median_s(lambda prompt=prompt: runner.run(prompt), rounds, place)
        rows.append(Row(f"{config.name} prefill {num_tokens}", took_s, prefill_flops(config, num_tokens) / flops_per_s))
    return rows


def measure_processes(devices: tuple[str, ...], arguments: argparse.Namespace) -> Iterator[Row]:
    device = None if arguments.rehearse else 0
    load = REHEARSED if arguments.rehearse else phases.Load()
    yield from transfer.measure(device, NUM_BLOCKS, arguments.rounds)
    yield phases.first_tokens(devices, load.num_long, arguments.rounds)
    yield from phases.gaps(devices, load)


def told(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        print(row, flush=True)
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind; medians are told")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, what needs no GPU")
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu"), help="folder for rows.json and rows.png")
    arguments = parser.parse_args()
    rows: list[Row] = []
    if arguments.rehearse:
        device, devices = "a rehearsal on the CPU", ("cpu",)
    elif reason := why_not():
        print(f"bench-gpu skipped: {reason}")
        return 0
    else:
        place = torch.device("cuda", 0)
        device = torch.cuda.get_device_name(place)
        devices = tuple(f"cuda:{n}" for n in range(min(2, torch.cuda.device_count())))
        rates = steps.bytes_per_s(arguments.rounds, place), steps.flops_per_s(arguments.rounds, place)
        print(f"{device}: {rates[0] / 1e9:.0f} GB/s copied (read and written), {rates[1] / 1e12:.0f} TFLOP/s")
        for name in arguments.shapes:
            rows += told(measure(SHAPES[name], arguments.rounds, rates, place))
        torch.cuda.empty_cache()  # the processes that follow need room
    rows += told(measure_processes(devices, arguments))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "rows.json", device, rows)
    write_png(arguments.out / "rows.png", device, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
