"""What computes in a worker: one runner in this process, or the first of several ranks with the others behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from services.engine.kernels.ceilings import highest
from services.engine.kernels.library import KernelsUnavailable
from services.engine.kernels.packed import PackedWeights
from services.engine.layout import ITEM_NBYTES, KvLayout
from services.engine.model_files import ModelFiles
from services.engine.parallel.frames import Setup
from services.engine.parallel.leader import LeadingRunner
from services.engine.parallel.shard import Shard
from services.engine.phases import Ceilings
from services.engine.runners import (
    WarmRunner,
    create_cuda_runner,
    create_runner,
    create_shard_runner,
    load_for_runner,
    why_torch,
)
from services.runtime.cpus import Cpus, format_cpus, pinned
from services.worker.config import WorkerConfig, weights_cache_folder
from services.worker.ranks import RankLostError, Ranks
from transport import Region

if TYPE_CHECKING:
    from services.engine.weights import Weights

log = structlog.get_logger(__name__)


class StartedRunner(NamedTuple):
    """A runner, warm.  ``exact``: whether a token of it is the same however many are computed at once.  ``weight_nbytes``:
    see ``ModelShape.of``."""

    runner: WarmRunner
    exact: bool
    weight_nbytes: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Compute:
    """``regions``: one for each rank.  ``returns_early``: see ``FlashInferRunner``."""

    files: ModelFiles
    dtype: str
    layout: KvLayout
    regions: Sequence[Region]
    num_blocks: int
    config: WorkerConfig
    log_name: str
    returns_early: bool

    async def start(self, stack: AsyncExitStack, on_lost: Callable[[RankLostError], None]) -> StartedRunner:
        """What it needs besides ends with ``stack``; ``on_lost``: see ``Ranks``.  Raises ModelError and others of kvferry's
        errors."""
        if self.config.tp > 1:
            return StartedRunner(await self._lead(stack, on_lost), False, self._unpacked_nbytes)
        weights = await asyncio.to_thread(self._load, Shard.whole(self.files.config))
        runner = await asyncio.to_thread(self._on_cpus, partial(self._alone, weights))
        if isinstance(weights, PackedWeights):
            return StartedRunner(runner, True, weights.weight_nbytes)
        return StartedRunner(runner, False, self._unpacked_nbytes)

    @property
    def _unpacked_nbytes(self) -> tuple[float, float]:
        return (ITEM_NBYTES[self.dtype],) * 2

    async def _lead(self, stack: AsyncExitStack, on_lost: Callable[[RankLostError], None]) -> WarmRunner:
        why_torch(self.files.config, self.dtype, compiled=False, num_ranks=self.config.tp)
        ranks = stack.enter_context(Ranks([self._setup(rank) for rank in range(1, self.config.tp)], on_lost))
        weights = await asyncio.to_thread(self._load, Shard.of(self.files.config, 0, self.config.tp))
        assert not isinstance(weights, PackedWeights)
        await asyncio.to_thread(ranks.join)
        runner = await asyncio.to_thread(self._on_cpus, partial(self._first, ranks, weights))
        await asyncio.to_thread(ranks.wait_ready)
        return runner

    def _load(self, shard: Shard) -> Weights | PackedWeights:
        config = self.config
        return load_for_runner(
            self.files.config, self.files.path, self.dtype,
            compiled=self.regions[0].device is None and config.compiled,
            cache_folder=weights_cache_folder(config.weights_cache), shard=shard,
        )  # fmt: skip

    def _alone(self, weights: Weights | PackedWeights) -> WarmRunner:
        model, region, config = self.files.config, self.regions[0], self.config
        runner: WarmRunner
        if region.device is None or isinstance(weights, PackedWeights):
            runner = create_runner(model, weights, self.layout, region.view, self.num_blocks, config.threads)
        else:
            runner = create_cuda_runner(
                model, weights, self.layout, region, self.num_blocks,
                compiled=config.compiled, max_running=config.max_running, returns_early=self.returns_early,
            )  # fmt: skip
        runner.warm_up()
        return runner

    def _first(self, ranks: Ranks, weights: Weights) -> WarmRunner:
        model, config = self.files.config, self.config
        try:
            own = create_shard_runner(
                model, weights, self.layout, self.regions[0], self.num_blocks, Shard.of(model, 0, config.tp),
                str(ranks.store),
                compiled=config.compiled, num_threads=config.threads, max_running=config.max_running,
                returns_early=self.returns_early,
            )  # fmt: skip
            own.warm_up()
        except Exception as e:
            raise ranks.broken(e) from e
        return LeadingRunner(own, ranks.tell, ranks.broken)

    async def ceilings(self) -> Ceilings:
        """Of what computes here, as told or as measured; 0 where neither can be."""
        config = self.config
        measured = Ceilings()
        is_told = config.peak_tflops > 0 and config.memory_bandwidth > 0
        if not is_told and self.regions[0].device is None and config.tp == 1:
            measured = await asyncio.to_thread(self._measure)
        ceilings = Ceilings(
            config.peak_tflops * 1e12 or measured.flops_per_s, config.memory_bandwidth * 1e9 or measured.bytes_per_s
        )
        log.info("ceilings", flops_per_s=ceilings.flops_per_s, bytes_per_s=ceilings.bytes_per_s)
        return ceilings

    def _measure(self) -> Ceilings:
        with pinned(self.config.compute_cpus):
            try:
                return highest(self.dtype, self.config.threads, weights_cache_folder(self.config.weights_cache))
            except KernelsUnavailable as error:
                log.warning("ceilings_unknown", reason=str(error))
                return Ceilings()

    def _on_cpus(self, create: Callable[[], WarmRunner]) -> WarmRunner:
        """Blocks.  The threads that it starts are on the processors for computing; the caller's stays where it was."""
        cpus: Cpus = self.config.compute_cpus
        with pinned(cpus):
            runner = create()
        log.info("compute", ranks=self.config.tp, threads=self.config.threads, cpus=format_cpus(cpus) or "any")
        return runner

    def _setup(self, rank: int) -> Setup:
        config, region = self.config, self.regions[rank]
        return Setup(
            rank=rank, size=config.tp, model=str(self.files.path), revision=self.files.config.revision,
            dtype=self.dtype, block_size=config.block_size, num_blocks=self.num_blocks, max_running=config.max_running,
            threads=config.threads, cpus=tuple(sorted(config.compute_cpus)), device=region.device, compiled=config.compiled,
            pool=region.lend().hex(), store="", log_name=f"{self.log_name}/{rank}", log_level=config.log_level.value,
            returns_early=self.returns_early,
        )  # fmt: skip
