"""Which code computes: the compiled kernels, or plain torch where they cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import structlog

from services.engine.engine import Runner
from services.engine.kernels.library import KernelsUnavailable, load
from services.engine.kernels.model import why_not
from services.engine.kernels.packing import FORMATS, PackedWeights, pack_stream
from services.engine.kernels.runner import CompiledRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig, ModelError
from services.engine.runner import TorchRunner
from services.engine.weights import DTYPES, Weights, WeightsReader, load_weights

log = structlog.get_logger(__name__)


class WarmRunner(Runner, Protocol):
    def warm_up(self) -> None:
        """Pays for what the first step would otherwise pay for.  Leaves the pool alone."""


def kv_dtype(dtype: str) -> str:
    """The type of the KV of a model that is served as ``dtype``: 8 bits are for weights alone."""
    return "bfloat16" if dtype == "int8" else dtype


def load_for_runner(config: ModelConfig, path: Path, dtype: str, *, compiled: bool) -> Weights | PackedWeights:
    """Weights in the form that the runner wants, by the compiled kernels or by torch; blocks.  Raises ModelError.  Where
    the kernels cannot be had, or have not this type, torch computes and one line of log says why; int8, which only they
    compute, is refused."""
    if dtype not in DTYPES and dtype not in FORMATS:
        raise ModelError(f"the type {dtype!r} is not supported; supported are {', '.join({**DTYPES, **FORMATS})}")
    reason = _kernels_missing(config, dtype) if compiled else "--kernels torch"
    if reason is not None and dtype == "int8":
        raise ModelError(f"int8 needs the compiled kernels ({reason}); or use --dtype bfloat16")
    if reason is not None:
        if compiled:
            log.warning("plain_torch", reason=reason)
        return load_weights(config, path, dtype)
    reader = WeightsReader(config, path, "float32" if dtype == "int8" else dtype)
    weights = pack_stream(config, dtype, reader.embedding(), reader.layers(), reader.norm(), reader.head())
    log.info("weights_packed", dtype=dtype, nbytes=weights.nbytes)
    return weights


def create_runner(config: ModelConfig, weights: Weights | PackedWeights, layout: KvLayout, arena_buffer: memoryview,
                  num_blocks: int, num_threads: int) -> WarmRunner:  # fmt: skip
    if isinstance(weights, Weights):
        return TorchRunner(config, weights, layout, arena_buffer, num_blocks, num_threads)
    runner = CompiledRunner(config, weights, layout, arena_buffer, num_blocks, num_threads)
    log.info("compiled_kernels", instruction_set=runner.model.instruction_set, threads=num_threads)
    return runner


def _kernels_missing(config: ModelConfig, dtype: str) -> str | None:
    if dtype not in FORMATS:
        return f"the kernels have no {dtype}"
    try:
        load()
    except KernelsUnavailable as error:
        return str(error)
    return why_not(config)
