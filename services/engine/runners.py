"""Which code computes: the compiled kernels, or plain torch where they cannot be had."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog

from services.engine.hf_checkpoint import weight_files
from services.engine.kernels import cache
from services.engine.kernels.library import KernelsUnavailable, load
from services.engine.kernels.model import why_not
from services.engine.kernels.packed import DTYPES, PackedWeights
from services.engine.kernels.runner import CompiledRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig, ModelError
from services.engine.parallel.shard import Shard
from services.engine.steps import Runner

# torch takes seconds to import, and a worker whose packed weights are in the cache does without: what needs it is imported
# where it is used.
if TYPE_CHECKING:
    from services.engine.batch import Batch
    from services.engine.copies import Copier
    from services.engine.parallel.group import Group
    from services.engine.weights import LayerWeights, Weights
    from transport import BorrowedMemory, Region

log = structlog.get_logger(__name__)

TELL_EVERY_S = 1.0
TORCH_DTYPES = ("float32", "bfloat16", "float16")


AUTO = "auto"


class WarmRunner(Runner, Protocol):
    def warm_up(self) -> None:
        """Pays for what the first step would otherwise pay for.  Leaves the pool alone."""


class ShardRunner(WarmRunner, Protocol):
    """Of one rank: all of a group warm up together, then compute the same steps in the same order, one by ``start`` and the
    others by ``follow``."""

    def follow(self, batch: Batch) -> None:
        """Computes this rank's share; nothing is drawn.  Blocks."""


def kv_dtype(dtype: str) -> str:
    """The type of the KV of a model that is served as ``dtype``: 8 bits are for weights alone."""
    return "bfloat16" if dtype == "int8" else dtype


def choose_dtype(config: ModelConfig, dtype: str, *, compiled: bool) -> str:
    """What AUTO stands for here: the fastest type that keeps the likeliest tokens of float32 (ADR 8), or float32 where the
    kernels cannot be had.  Any other is itself."""
    if dtype != AUTO:
        return dtype
    return "int8" if compiled and _kernels_missing(config, "int8") is None else "float32"


def choose_cuda_dtype(config: ModelConfig, dtype: str, *, compiled: bool) -> str:
    """As ``choose_dtype``, on a GPU, where FlashInfer's are the compiled kernels.  Raises ModelError for a type or a model
    that they have not, or torch has not."""
    chosen = "bfloat16" if dtype == AUTO else dtype
    if chosen not in TORCH_DTYPES:
        others = "bfloat16 or float16" if compiled else "float32, bfloat16 or float16"
        raise ModelError(f"no kernels for GPUs have {chosen}; use --dtype {others}")
    if compiled:
        from services.engine import flashinfer_kernels

        if reason := flashinfer_kernels.why_not(config.head_dim, chosen):
            raise ModelError(f"{reason}; or --kernels torch, which is slower")
    return chosen


def load_for_runner(
    config: ModelConfig, path: Path, dtype: str, *, compiled: bool, cache_folder: Path | None = None,
    shard: Shard | None = None,
) -> Weights | PackedWeights:  # fmt: skip
    """Weights in the form that the runner wants, by the compiled kernels or by torch; blocks.  Raises ModelError.  Where
    the kernels cannot be had, or have not this type, torch computes and one line of log says why; int8, which only they
    compute, is refused.  ``cache_folder``: where packed weights are kept for the next start and for other workers.
    ``shard``: one rank's, of several; torch computes those."""
    reason = why_torch(config, dtype, compiled=compiled, num_ranks=1 if shard is None else shard.size)
    if reason is not None:
        if compiled:
            log.warning("plain_torch", reason=reason)
        from services.engine.weights import load_weights

        return load_weights(config, path, dtype, shard=shard)
    if cache_folder is None:
        return _pack(config, path, dtype)
    files = [path] if path.is_file() else weight_files(path)
    name = cache.key(config.revision, dtype, files)
    return cache.load_or_pack(cache_folder, name, lambda: _pack(config, path, dtype))


def why_torch(config: ModelConfig, dtype: str, *, compiled: bool, num_ranks: int) -> str | None:
    """Why plain torch computes; None where the compiled kernels do.  Raises ModelError for a type that neither has."""
    if dtype not in TORCH_DTYPES and dtype not in DTYPES:
        known = dict.fromkeys((*TORCH_DTYPES, *DTYPES))
        raise ModelError(f"the type {dtype!r} is not supported; supported are {', '.join(known)}")
    if num_ranks > 1:
        reason: str | None = f"--tp {num_ranks}"
    else:
        reason = _kernels_missing(config, dtype) if compiled else "--kernels torch"
    if reason is not None and dtype == "int8":
        raise ModelError(f"int8 needs the compiled kernels ({reason}); or use --dtype bfloat16")
    return reason


def _pack(config: ModelConfig, path: Path, dtype: str) -> PackedWeights:
    from services.engine.kernels.packing import pack_stream
    from services.engine.weights import WeightsReader

    log.info("packing_weights", dtype=dtype)
    reader = WeightsReader(config, path, "float32" if dtype == "int8" else dtype)
    layers = _telling(reader.layers(), config.num_layers)
    weights = pack_stream(config, dtype, reader.embedding(), layers, reader.norm(), reader.head())
    log.info("weights_packed", dtype=dtype, nbytes=weights.nbytes)
    return weights


def _telling(layers: Iterable[LayerWeights], num_layers: int) -> Iterator[LayerWeights]:
    """The layers, with a line of log each second, for a model of many layers takes minutes."""
    told_s = time.monotonic()
    for done, layer in enumerate(layers):
        if time.monotonic() - told_s >= TELL_EVERY_S:
            told_s = time.monotonic()
            log.info("packing_weights", done=done, total=num_layers)
        yield layer


def create_runner(config: ModelConfig, weights: Weights | PackedWeights, layout: KvLayout, arena_buffer: memoryview,
                  num_blocks: int, num_threads: int) -> WarmRunner:  # fmt: skip
    if not isinstance(weights, PackedWeights):
        from services.engine.runner import TorchRunner

        return TorchRunner(config, weights, layout, arena_buffer, num_blocks, num_threads)
    runner = CompiledRunner(config, weights, layout, arena_buffer, num_blocks, num_threads)
    log.info("compiled_kernels", instruction_set=runner.model.instruction_set, threads=num_threads)
    return runner


def create_shard_runner(model: ModelConfig, weights: Weights, layout: KvLayout, pool: Region | BorrowedMemory,
                        num_blocks: int, shard: Shard, store: str, *, compiled: bool, num_threads: int,
                        max_running: int, returns_early: bool) -> ShardRunner:  # fmt: skip
    """Of one rank, over its region of a pool of ``layout``; blocks until all ranks are here.  ``store``: see
    ``TorchGroup``, and for its failures too.  ``compiled``: on GPUs, for on CPUs plain torch computes."""
    import torch

    from services.engine.parallel.group import TorchGroup
    from services.engine.runner import TorchRunner

    config, own_layout = shard.config(model), layout.of_rank(shard.rank)
    place = torch.device("cpu") if pool.device is None else torch.device("cuda", pool.device)
    group = TorchGroup(shard.rank, shard.size, Path(store), place)
    log.info("rank_joined", rank=shard.rank, size=shard.size, kv_heads=len(shard.kv_heads))
    if pool.device is None:
        return TorchRunner(config, weights, own_layout, pool.view, num_blocks, num_threads, group)
    return create_cuda_runner(
        config, weights, own_layout, pool, num_blocks,
        compiled=compiled, max_running=max_running, returns_early=returns_early, group=group,
    )  # fmt: skip


def create_cuda_runner(config: ModelConfig, weights: Weights, layout: KvLayout, pool: Region | BorrowedMemory,
                       num_blocks: int, *, compiled: bool, max_running: int, returns_early: bool,
                       group: Group | None = None) -> ShardRunner:  # fmt: skip
    """On the GPU whose memory ``pool`` is, by FlashInfer's kernels where ``compiled``, or else by plain torch; the weights,
    on the host so far, go there.  ``max_running``, ``returns_early``: see ``FlashInferRunner``; torch needs no such thing.
    Raises ModelError."""
    import torch

    from services.engine import flashinfer_kernels
    from services.engine.device import CudaDevice
    from services.engine.flashinfer_runner import FlashInferRunner, cuda_arena
    from services.engine.parallel.group import ALONE
    from services.engine.runner import DeviceTorchRunner
    from services.engine.weights import weights_on

    assert pool.device is not None
    kernels = flashinfer_kernels.load() if compiled else None
    if not torch.cuda.is_available():
        raise ModelError(f"torch {torch.__version__} reaches no GPU; install one built for CUDA, or use --device cpu")
    place = torch.device("cuda", pool.device)
    device, group = CudaDevice(place), group or ALONE
    with device.current():
        arena = cuda_arena(pool.address, num_blocks, layout, place, pool)
        weights = weights_on(weights, place)
    runner: ShardRunner
    if kernels is None:
        runner = DeviceTorchRunner(config, weights, layout, arena, device, group)
    else:
        runner = FlashInferRunner(
            config, weights, layout, arena, kernels, device,
            max_running=max_running, returns_early=returns_early, group=group,
        )  # fmt: skip
    event = "plain_torch" if kernels is None else "flashinfer_kernels"
    log.info(event, device=torch.cuda.get_device_name(place))
    return runner


def create_host_copier(pool: Region, layout: KvLayout, num_blocks: int, num_slots: int) -> Copier:
    """With room for ``num_slots`` blocks.  Blocks while the memory is made.  Raises OutOfMemory."""
    if pool.device is None:
        from services.engine.host_copier import HostCopier

        return HostCopier(pool, layout.block_nbytes, num_slots)
    import torch

    from services.engine.cuda_copier import CudaCopier
    from services.engine.flashinfer_runner import cuda_arena

    place = torch.device("cuda", pool.device)
    with torch.cuda.device(place):
        return CudaCopier(cuda_arena(pool.address, num_blocks, layout, place, pool), num_slots)


def _kernels_missing(config: ModelConfig, dtype: str) -> str | None:
    if dtype not in DTYPES:
        return f"the kernels have no {dtype}"
    try:
        load()
    except KernelsUnavailable as error:
        return str(error)
    return why_not(config)
