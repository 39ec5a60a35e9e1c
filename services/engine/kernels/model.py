"""The forward pass of the Llama family by the compiled kernels: steps are handed over to threads of theirs."""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from ctypes import byref

import numpy as np
import numpy.typing as npt

from services.engine.batch import Batch
from services.engine.kernels.draws import DrawMemory
from services.engine.kernels.library import (
    BatchStruct,
    KernelsUnavailable,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    instruction_sets,
    load,
)
from services.engine.kernels.packed import FORMATS, PackedMatrix, PackedWeights
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.steps import Outcome

F32 = npt.NDArray[np.float32]

_HEAD_DIM_MULTIPLE, _MAX_HEAD_DIM = 32, 256


def why_not(config: ModelConfig) -> str | None:
    """What the kernels lack for this model, None when nothing."""
    if config.head_dim % _HEAD_DIM_MULTIPLE or config.head_dim > _MAX_HEAD_DIM:
        return f"heads of {config.head_dim} dimensions: the kernels take multiples of {_HEAD_DIM_MULTIPLE} up to 256"
    return None


class CompiledModel:
    """Not thread-safe.  A row's result depends on its own sequence and on nothing else, to the last bit: not on what shares
    its step, on how its prompt was cut into chunks, or on the number of threads."""

    def __init__(self, config: ModelConfig, weights: PackedWeights, layout: KvLayout, *, num_threads: int,
                 instruction_set: str | None = None) -> None:  # fmt: skip
        """``instruction_set``: one of ``library.instruction_sets()``, by default the fastest.  The threads that
        compute sleep between steps; the caller's is none of them.  Raises KernelsUnavailable."""
        if reason := why_not(config):
            raise KernelsUnavailable(reason)
        self._lib = load()
        available = instruction_sets()
        self.instruction_set = instruction_set or available[0]
        if self.instruction_set not in available:
            raise ValueError(f"this processor has no {self.instruction_set}; it has {', '.join(available)}")
        self._config, self._layout, self._weights = config, layout, weights
        self._struct = self._describe()
        engine = self._lib.kvf_open(self.instruction_set.encode(), num_threads)
        if not engine:
            raise KernelsUnavailable(f"{num_threads} threads could not be started; give fewer with --threads")
        self._engine = engine
        self._unfinished: deque[CompiledStep] = deque()  # whose memory the kernels use
        self._num_drawn = 0  # by the step handed over last
        weakref.finalize(self, self._lib.kvf_close, engine)

    def start(self, batch: Batch, arena: memoryview, num_blocks: int, *, logits: F32 | None = None) -> CompiledStep:
        """Hands a step over, at most two at a time; does not block.  The new tokens' KV is written into ``arena``.
        ``logits``, [len(batch.samples), ``num_logits``], receives what is drawn from."""
        self._check(batch, num_blocks)
        step = CompiledStep(self, batch, logits)
        step.struct.arena = ctypes.addressof(ctypes.c_char.from_buffer(arena))
        step.struct.block_size = self._layout.block_size
        step.struct.kv_half = int(self._layout.dtype == "bfloat16")
        step.number = self._lib.kvf_start(self._engine, byref(self._struct), byref(step.struct))
        self._unfinished.append(step)
        self._num_drawn = len(batch.samples)
        return step

    def logits(self, batch: Batch, arena: memoryview, num_blocks: int) -> F32:
        """What a step would draw from: [len(batch.samples), vocab].  Blocks."""
        logits = np.empty((len(batch.samples), self._weights.head.num_rows), dtype=np.float32)
        self.start(batch, arena, num_blocks, logits=logits).result()
        return logits[:, : self._config.vocab_size]

    def wait_nearly(self, step: CompiledStep) -> None:
        self._lib.kvf_wait_nearly(self._engine, step.number)

    def wait(self, step: CompiledStep) -> None:
        """The steps before it have ended too."""
        self._lib.kvf_wait(self._engine, step.number)
        while self._unfinished and self._unfinished.popleft() is not step:
            pass

    def _check(self, batch: Batch, num_blocks: int) -> None:
        """Nothing is checked in C, where a wrong index writes anywhere."""
        block_size = self._layout.block_size
        contexts = (np.diff(batch.kv_indptr) - 1) * block_size + batch.kv_last_page_len
        last = batch.positions[batch.qo_indptr[1:] - 1]
        if not (
            -self._num_drawn <= batch.token_ids.min() <= batch.token_ids.max() < self._config.vocab_size
            and 0 <= batch.slots.min() <= batch.slots.max() < num_blocks * block_size
            and 0 <= batch.kv_indices.min() <= batch.kv_indices.max() < num_blocks
            and len(batch.kv_indices) == batch.kv_indptr[-1]
            and batch.num_tokens == batch.qo_indptr[-1] == len(batch.positions) == len(batch.slots)
            and batch.positions.min() >= 0
            and len(batch.samples) <= batch.num_tokens
            and all(0 <= sample.row < batch.num_tokens for sample in batch.samples)
            and (last + 1 == contexts).all()
        ):
            raise ValueError(f"a step names a token or a block that there is not: {batch}")

    def _describe(self) -> ModelStruct:
        config, weights = self._config, self._weights
        layers = (LayerStruct * config.num_layers)(
            *(
                LayerStruct(
                    qkv=_matrix(layer.qkv),
                    output=_matrix(layer.output),
                    gate_up=_matrix(layer.gate_up),
                    down=_matrix(layer.down),
                    attention_norm=layer.attention_norm.data_ptr(),
                    mlp_norm=layer.mlp_norm.data_ptr(),
                    qkv_bias=None if layer.qkv_bias is None else layer.qkv_bias.data_ptr(),
                )
                for layer in weights.layers
            )
        )
        return ModelStruct(
            format=FORMATS[weights.dtype],
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            window=config.sliding_window or 0,
            norm_eps=config.norm_eps,
            frequencies=weights.frequencies.data_ptr(),
            norm=weights.norm.data_ptr(),
            embedding=_matrix(weights.embedding),
            head=_matrix(weights.head),
            layers=layers,
        )


class CompiledStep:
    """A step under way, and the memory that it reads and writes."""

    def __init__(self, model: CompiledModel, batch: Batch, logits: F32 | None) -> None:
        self.number = 0
        self._model, self._batch, self._logits = model, batch, logits
        self._rows = np.array([sample.row for sample in batch.samples], dtype=np.int64)
        self._memory = memory = DrawMemory(batch.samples)
        self.struct = BatchStruct(
            num_tokens=batch.num_tokens,
            num_sequences=batch.num_sequences,
            num_sampled=len(batch.samples),
            token_ids=batch.token_ids.ctypes.data,
            positions=batch.positions.ctypes.data,
            slots=batch.slots.ctypes.data,
            qo_indptr=batch.qo_indptr.ctypes.data,
            kv_indptr=batch.kv_indptr.ctypes.data,
            kv_indices=batch.kv_indices.ctypes.data,
            sampled=self._rows.ctypes.data,
            sampling=memory.sampling.ctypes.data,
            drawn=memory.drawn.ctypes.data,
            top=memory.top.ctypes.data,
            top_logprobs=memory.top_logprobs.ctypes.data,
            top_stride=memory.stride,
            logits=None if logits is None else logits.ctypes.data,
        )

    def wait_nearly(self) -> None:
        self._model.wait_nearly(self)

    def result(self) -> Outcome:
        self._model.wait(self)
        if self.struct.failed:
            raise MemoryError(f"no memory for a step of {self._batch.num_tokens} tokens; lower --chunk-tokens")
        return Outcome(self._memory.draws(), self.struct.began_ns / 1e9, self.struct.ended_ns / 1e9)


def _matrix(matrix: PackedMatrix) -> MatrixStruct:
    return MatrixStruct(
        values=matrix.values.data_ptr(),
        scales=None if matrix.scales is None else matrix.scales.data_ptr(),
        num_rows=matrix.num_rows,
        num_columns=matrix.num_columns,
        format=FORMATS[matrix.format],
    )
