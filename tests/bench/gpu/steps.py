"""Steps of a model with random weights on a GPU, and what that GPU can do.  Has never run on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from services.engine.batch import Batch, Entry, build_batch
from services.engine.device import CudaDevice
from services.engine.flashinfer_kernels import load
from services.engine.flashinfer_runner import FlashInferRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.sampling_params import Sampling
from services.engine.weights import LayerWeights, Weights

BLOCK_SIZE = 16
_LARGE = 1 << 30


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


def _settle(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def bytes_per_s(rounds: int, place: torch.device) -> float:
    """Read and written by a large copy."""
    source, target = (torch.zeros(_LARGE, dtype=torch.uint8, device=place) for _ in range(2))
    return 2 * _LARGE / median_s(lambda: target.copy_(source), rounds, place)


def flops_per_s(rounds: int, place: torch.device) -> float:
    one = torch.randn((8192, 8192), dtype=torch.bfloat16, device=place)
    return 2 * 8192**3 / median_s(lambda: one @ one, rounds, place)


def make_runner(config: ModelConfig, num_blocks: int, max_running: int, place: torch.device) -> FlashInferRunner:
    layout = KvLayout(config.revision, "bfloat16", BLOCK_SIZE, config.num_layers, config.num_kv_heads, config.head_dim)
    arena = torch.zeros((num_blocks, *layout.block_shape), dtype=torch.bfloat16, device=place)
    return FlashInferRunner(
        config, _random_weights(config, place), layout, arena, load(), CudaDevice(place),
        max_running=max_running, returns_early=False,
    )  # fmt: skip


def decode_batch(batch: int, context: int) -> Batch:
    """Every sequence has blocks of its own."""
    each = -(-context // BLOCK_SIZE)
    return build_batch(
        [Entry([1], context - 1, range(i * each, (i + 1) * each), Sampling()) for i in range(batch)], BLOCK_SIZE
    )


def prefill_batch(num_tokens: int) -> Batch:
    return build_batch([Entry([1] * num_tokens, 0, range(-(-num_tokens // BLOCK_SIZE)), Sampling())], BLOCK_SIZE)


def _random_weights(config: ModelConfig, place: torch.device) -> Weights:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=place) * shape[-1] ** -0.5

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
