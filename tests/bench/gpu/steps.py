"""Steps of a model with random weights on a GPU, and what that GPU can do.  Has never run on a device.

A step is the runner's: what the scheduler does between two is not in it.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from services.engine.batch import Batch, Entry, build_batch
from services.engine.device import Device
from services.engine.flashinfer_kernels import FlashInfer
from services.engine.flashinfer_runner import FlashInferRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.sampling_params import Sampling
from services.engine.weights import LayerWeights, Weights
from tests.bench.gpu.floors import BLOCK_SIZE, LLAMA_8B, decode_nbytes, fitting, prefill_flops
from tests.bench.gpu.rows import NotMeasured, Row, less_is_better

MOST_SHARE = 0.6  # of the memory, for weights and KV; the rest is the graphs', the copy's and whoever else's
DECODE_GOAL, DECODE_GOAL_FROM = 0.75, 16  # sequences
PREFILL_GOAL, PREFILL_GOAL_OF = 0.6, (LLAMA_8B.name, 2048)


@dataclass(frozen=True, slots=True)
class Machine:
    """What computes.  Each runner has a device of its own: graphs share memory on one."""

    place: torch.device
    kernels: FlashInfer
    make_device: Callable[[], Device]

    @property
    def memory_nbytes(self) -> int:
        if self.place.type == "cuda":
            return torch.cuda.get_device_properties(self.place).total_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Rates:
    """``bytes_per_s``: read and written, by a copy."""

    bytes_per_s: float
    flops_per_s: float

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:.0f} GB/s copied (read and written), {self.flops_per_s / 1e12:.1f} TFLOP/s"


@dataclass(frozen=True, slots=True)
class Works:
    """(batch, context) of steps that decode, tokens of prompts that are computed in one step; empty is none."""

    batches: Sequence[int]
    contexts: Sequence[int]
    prompts: Sequence[int]


def measure(
    config: ModelConfig, works: Works, rounds: int, rates: Rates, machine: Machine
) -> Iterator[Row | NotMeasured]:
    fit, beyond = fitting(config, works.batches, works.contexts, machine.memory_nbytes * MOST_SHARE)
    for batch, context in beyond:
        yield NotMeasured(f"{config.name} decode {batch} x {context}", "its KV does not fit into this GPU")
    if not fit and not works.prompts:
        return
    walks = [(batch, *bounds(context, rounds)) for batch, context in fit]
    blocks = [batch * table_blocks(last) for batch, _, last in walks] + [-(-n // BLOCK_SIZE) for n in works.prompts]
    runner = make_runner(config, max(blocks), max(works.batches, default=1), machine)
    runner.warm_up()
    for (batch, context), (_, first, last) in zip(fit, walks, strict=True):
        took_s, num_foreseen = walk(runner, decode_batches(batch, first, last))
        floor_s = decode_nbytes(config, batch, (first + 1 + last) / 2) / rates.bytes_per_s
        goal = DECODE_GOAL if batch >= DECODE_GOAL_FROM else None
        note = f"{num_foreseen} of {last - first} steps foreseen"
        yield less_is_better(f"{config.name} decode {batch} x {context}", took_s, floor_s, goal, note)
    for num_tokens in works.prompts:
        prompt = prefill_batch(num_tokens)
        took_s = median_s(lambda prompt=prompt: runner.run(prompt), rounds, machine.place)
        floor_s = prefill_flops(config, num_tokens) / rates.flops_per_s
        goal = PREFILL_GOAL if (config.name, num_tokens) == PREFILL_GOAL_OF else None
        yield less_is_better(f"{config.name} prefill {num_tokens}", took_s, floor_s, goal, "in one step")


def median_s(run: Callable[[], object], rounds: int, place: torch.device) -> float:
    """Of ``rounds``, after one that does not count; each begins and ends with nothing under way on a GPU."""
    times = []
    for _ in range(rounds + 1):
        _settle(place)
        began_s = time.perf_counter()
        run()
        _settle(place)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[1:])


def walk(runner: FlashInferRunner, steps: Sequence[Batch]) -> tuple[float, int]:
    """The median's seconds of the steps behind the first, one right after the other as in service: each waits for its
    tokens alone; and of how many the runner had made the metadata before they came."""
    runner.run(steps[0])
    foreseen, times = runner.num_foreseen, []
    for step in steps[1:]:
        began_s = time.perf_counter()
        runner.run(step)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times), runner.num_foreseen - foreseen


def _settle(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def release(place: torch.device) -> None:
    """What earlier steps held, for the processes and models that follow need room."""
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()


def rates(nbytes: int, side: int, rounds: int, place: torch.device) -> Rates:
    """By a copy of ``nbytes``, and by the product of two bfloat16 matrices of ``side`` rows and columns."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=place) for _ in range(2))
    copy_s = median_s(lambda: target.copy_(source), rounds, place)
    matrix = torch.randn((side, side), dtype=torch.bfloat16, device=place)
    return Rates(2 * nbytes / copy_s, 2 * side**3 / median_s(lambda: matrix @ matrix, rounds, place))


def make_runner(config: ModelConfig, num_blocks: int, max_running: int, machine: Machine) -> FlashInferRunner:
    layout = KvLayout(config.revision, "bfloat16", BLOCK_SIZE, config.num_layers, config.num_kv_heads, config.head_dim)
    arena = torch.zeros((num_blocks, *layout.block_shape), dtype=torch.bfloat16, device=machine.place)
    return FlashInferRunner(
        config, _random_weights(config, machine.place), layout, arena, machine.kernels, machine.make_device(),
        max_running=max_running, returns_early=False,
    )  # fmt: skip


def bounds(context: int, rounds: int) -> tuple[int, int]:
    """Tokens that the first and the last step of a walk attend to: one step that does not count, then ``rounds``, around
    ``context``."""
    first = max(1, context - (rounds + 1) // 2)
    return first, first + rounds


def table_blocks(last: int) -> int:
    """Of a sequence that ends with ``last`` tokens and has the block that it needs next in hand."""
    return -(-last // BLOCK_SIZE) + 1


def decode_batches(batch: int, first: int, last: int) -> list[Batch]:
    """Steps of as many sequences, a token further each.  Every sequence has blocks of its own, and the next one a step
    early, as the scheduler gives them to a worker on a GPU (``Limits.look_ahead``)."""
    each = table_blocks(last)
    tables = [range(i * each, (i + 1) * each) for i in range(batch)]
    return [
        build_batch([Entry([1], context - 1, table, Sampling()) for table in tables], BLOCK_SIZE)
        for context in range(first, last + 1)
    ]


def prefill_batch(num_tokens: int) -> Batch:
    return build_batch([Entry([1] * num_tokens, 0, range(-(-num_tokens // BLOCK_SIZE)), Sampling())], BLOCK_SIZE)


def random_matrix(place: torch.device, *shape: int) -> torch.Tensor:
    """bfloat16, of a size that keeps a layer's output as large as its input."""
    return torch.randn(shape, dtype=torch.bfloat16, device=place) * shape[-1] ** -0.5


def _random_weights(config: ModelConfig, place: torch.device) -> Weights:
    def random(*shape: int) -> torch.Tensor:
        return random_matrix(place, *shape)

    hidden, inner, size = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    layers = tuple(
        LayerWeights(random(hidden), random(size + 2 * kv_size, hidden), None, random(hidden, size), random(hidden),
                     random(2 * inner, hidden), random(hidden, inner))
        for _ in range(config.num_layers)
    )  # fmt: skip
    embedding = random(config.vocab_size, hidden)
    head = embedding if config.tied_embeddings else random(config.vocab_size, hidden)
    return Weights(embedding, layers, random(hidden), head)
