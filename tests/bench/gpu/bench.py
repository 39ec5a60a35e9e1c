"""make bench-gpu, on NVIDIA GPUs, for the shapes of SmolLM2-135M and Llama-3.1-8B with random weights: decode steps against
the time that their bytes take, prefill against the time of its sums, KV between two processes against a copy, and in
clusters of real processes TTFT split against one worker, and the gaps of streams beside long prompts against without.

Each row is in the files as soon as it is measured; a work that fails is told, and the others go on.  For ttft and itl a
model's weights are written to the folder for temporary files first, 16 GB for the 8B shape (TMPDIR names another).

With --rehearse everything runs on the CPU, with tiny shapes and a stand-in for the kernels: to see that it runs, not to
measure.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from services.engine import flashinfer_kernels
from services.engine.device import CudaDevice
from services.engine.model_config import ModelConfig
from tests.bench.gpu import phases, steps, transfer
from tests.bench.gpu.about import describe
from tests.bench.gpu.floors import SHAPES, tiny
from tests.bench.gpu.models import saved
from tests.bench.gpu.rows import Book, NotMeasured, Row
from tests.engine import fake_flashinfer
from tests.engine.fake_device import FakeDevice
from tests.gpu.needs import why_not

DECODE, PREFILL, TRANSFER = "decode", "prefill", "transfer"
WORKS = (TRANSFER, DECODE, PREFILL, phases.TTFT, phases.ITL)


@dataclass(frozen=True, slots=True)
class Sizes:
    """``copy_nbytes`` and ``matmul_side``: of what the machine's rates are measured by."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    copy_nbytes: int
    matmul_side: int
    moved_nbytes: int
    load: phases.Load


FULL = Sizes((1, 16, 64, 256), (512, 4096), (512, 2048, 8192), 1 << 30, 8192, 256 << 20, phases.Load())
REHEARSED = Sizes((1, 5), (40, 70), (33, 100), 1 << 20, 128, 1 << 20, phases.Load(2, 16, 300, 300))


@dataclass(frozen=True, slots=True)
class Bench:
    """``devices``: of workers, as ``--device`` has them."""

    machine: steps.Machine
    devices: tuple[str, ...]
    sizes: Sizes
    rounds: int
    only: frozenset[str]

    def rates(self) -> steps.Rates | None:
        """None: nothing needs them."""
        if not self.only & {DECODE, PREFILL}:
            return None
        return steps.rates(self.sizes.copy_nbytes, self.sizes.matmul_side, self.rounds, self.machine.place)

    def works(
        self, config: ModelConfig, rates: steps.Rates | None
    ) -> Iterator[tuple[str, Iterator[Row | NotMeasured]]]:
        """What is measured together, by name, each when it is iterated over."""
        sizes, place = self.sizes, self.machine.place
        if TRANSFER in self.only:
            device = 0 if place.type == "cuda" else None
            yield f"{config.name} {TRANSFER}", transfer.measure(config, device, sizes.moved_nbytes, self.rounds)
        if rates is not None:
            batches, prompts = (
                sizes.batches if DECODE in self.only else (),
                sizes.prompts if PREFILL in self.only else (),
            )
            works = steps.Works(batches, sizes.contexts, prompts)
            yield f"{config.name} steps", steps.measure(config, works, self.rounds, rates, self.machine)
        if served := self.only & {phases.TTFT, phases.ITL}:
            yield f"{config.name} {' and '.join(sorted(served))}", self._serve(config)

    def _serve(self, config: ModelConfig) -> Iterator[Row]:
        with saved(config, self.machine.place) as folder:
            steps.release(self.machine.place)
            served = phases.Served(config, folder, self.devices)
            yield from phases.measure(served, self.sizes.load, self.rounds, self.only)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of each work; medians are told (default: 20)")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="works (default: all)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu"), help="folder for rows.json and rows.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    only = frozenset(arguments.only)
    configs = [SHAPES[name] for name in arguments.shapes]
    if arguments.rehearse:
        machine = steps.Machine(torch.device("cpu"), fake_flashinfer, FakeDevice)
        bench = Bench(machine, ("cpu",), REHEARSED, arguments.rounds, only)
        configs = [tiny(config) for config in configs]
    elif reason := why_not():
        print(f"bench-gpu: {reason}; ARGS=--rehearse runs it on the CPU", file=sys.stderr)
        return 1
    else:
        place = torch.device("cuda", 0)
        devices = tuple(f"cuda:{n}" for n in range(min(2, torch.cuda.device_count())))
        machine = steps.Machine(place, flashinfer_kernels.load(), lambda: CudaDevice(place))
        bench = Bench(machine, devices, FULL, arguments.rounds, only)
    return measure(bench, configs, Book(arguments.out, describe(machine.place)))


def measure(bench: Bench, configs: Sequence[ModelConfig], book: Book) -> int:
    """The status to exit with: 1 where a work failed."""
    for name, value in book.machine.items():
        print(f"{name}: {value}")
    rates = bench.rates()
    if rates is not None:
        print(rates, flush=True)
        book.machine |= {
            "copy_gb_read_and_written_per_s": rates.bytes_per_s / 1e9,
            "matmul_tflop_per_s": rates.flops_per_s / 1e12,
        }
    status = 0
    for config in configs:
        for name, rows in bench.works(config, rates):
            try:
                for row in rows:
                    book.add(row)
            except Exception as error:
                traceback.print_exc()
                book.add(NotMeasured(name, f"failed with {type(error).__name__}: {error}"))
                status = 1
            steps.release(bench.machine.place)
    return status
