"""A worker without a model, over the loopback transport."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvferry.api.common.v1 import common_pb2
from services.engine.batch import Batch
from services.engine.blocks import BlockPool
from services.engine.copies import CopyThread
from services.engine.engine import Engine
from services.engine.host_tier import HostTier
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.ready import Ready
from services.engine.sampling_params import Drawn
from services.engine.scheduler import Limits, Scheduler
from services.engine.steps import Blocking, Draws
from services.runtime.process import ProcessIdentity
from services.worker.events import EventRouter
from services.worker.pins import PinBook
from services.worker.worker import Identity, Worker
from transport import Transport

MODEL = ModelConfig(
    name="m", revision="r", architecture="llama", hidden_size=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
    intermediate_size=2, vocab_size=100, context_length=64, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
    tied_embeddings=True, sliding_window=None, qkv_bias=False, bos_token_id=None, eos_token_ids=(),
)  # fmt: skip
LAYOUT = KvLayout(model_revision="r", dtype="float32", block_size=4, num_layers=1, num_kv_heads=1, head_dim=2)
NUM_BLOCKS = 16
SAMPLING = common_pb2.SamplingParams(max_tokens=4, temperature=0, top_p=1, top_k=0, seed=0)
NO_PROCESS = ProcessIdentity("", 0, 0, 0)


class AlwaysSeven:
    """Computes nothing, and draws the same token for whoever asks."""

    runs_ahead = False
    ready: Ready | None = None

    def start(self, batch: Batch) -> Blocking:
        return Blocking(lambda: self.run(batch), lambda: self.ready)

    def run(self, batch: Batch) -> Draws:
        return [Drawn(7) for _ in batch.samples]


@dataclass(slots=True)
class HeldDigester:
    """Says what it was asked for, and ends when the test sets ``found``."""

    begun: list[tuple[tuple[int, ...], int, int]] = field(default_factory=list)
    found: list[asyncio.Future[list[int]]] = field(default_factory=list)

    def digest(self, blocks: tuple[int, ...], first_index: int, num_prompt_tokens: int) -> asyncio.Future[list[int]]:
        self.begun.append((blocks, first_index, num_prompt_tokens))
        self.found.append(asyncio.get_running_loop().create_future())
        return self.found[-1]


def make_worker(
    transport: Transport, worker_id: str, role: common_pb2.WorkerRole.ValueType, *, num_host_slots: int = 0,
    copies: CopyThread | None = None,
) -> Worker:  # fmt: skip
    """Its engine is not started."""
    router = EventRouter(asyncio.get_running_loop())
    pool = BlockPool(NUM_BLOCKS)
    limits = Limits(block_size=4, context_length=64, max_step_tokens=8)
    scheduler = Scheduler(pool, limits, HostTier(pool, num_host_slots))
    region = transport.allocate(NUM_BLOCKS * LAYOUT.block_nbytes)
    identity = Identity(worker_id, 1, role, "127.0.0.1:1", NO_PROCESS)
    return Worker(
        identity,
        MODEL,
        LAYOUT,
        transport,
        region,
        Engine(scheduler, AlwaysSeven(), router, copies=copies),
        router,
        PinBook(pool, max_blocks=4, max_pins=4),
    )
