"""The forward pass of the Llama family by the compiled kernels: one call into C for each step."""

from __future__ import annotations

import ctypes
import time
import weakref
from ctypes import byref

import numpy as np
import numpy.typing as npt

from services.engine.batch import Batch
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
        """``instruction_set``: one of ``library.instruction_sets()``, by default the fastest.  Threads other than the
        caller's sleep between steps.  Raises KernelsUnavailable."""
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
        self.late_s = 0.0  # see Runner
        weakref.finalize(self, self._lib.kvf_close, engine)

    def forward(self, batch: Batch, arena: memoryview, num_blocks: int) -> F32:
        """Writes the new tokens' KV into ``arena`` and returns logits, [len(batch.samples), vocab]: one row for each
        token to draw."""
        self._check(batch, num_blocks)
        sampled = np.array([sample.row for sample in batch.samples], dtype=np.int64)
        logits = np.empty((len(sampled), self._weights.head.num_rows), dtype=np.float32)
        struct = BatchStruct(
            num_tokens=batch.num_tokens,
            num_sequences=batch.num_sequences,
            num_sampled=len(sampled),
            token_ids=batch.token_ids.ctypes.data,
            positions=batch.positions.ctypes.data,
            slots=batch.slots.ctypes.data,
            qo_indptr=batch.qo_indptr.ctypes.data,
            kv_indptr=batch.kv_indptr.ctypes.data,
            kv_indices=batch.kv_indices.ctypes.data,
            sampled=sampled.ctypes.data,
            arena=ctypes.addressof(ctypes.c_char.from_buffer(arena)),
            block_size=self._layout.block_size,
            kv_half=int(self._layout.dtype == "bfloat16"),
            logits=logits.ctypes.data,
        )
        if self._lib.kvf_run(self._engine, byref(self._struct), byref(struct)) != 0:
            raise MemoryError(f"no memory for a step of {batch.num_tokens} tokens; lower --chunk-tokens")
        self.late_s = (time.monotonic_ns() - struct.ended_ns) / 1e9
        return logits[:, : self._config.vocab_size]

    def _check(self, batch: Batch, num_blocks: int) -> None:
        """Nothing is checked in C, where a wrong index writes anywhere."""
        block_size = self._layout.block_size
        contexts = (np.diff(batch.kv_indptr) - 1) * block_size + batch.kv_last_page_len
        last = batch.positions[batch.qo_indptr[1:] - 1]
        if not (
            0 <= batch.token_ids.min() <= batch.token_ids.max() < self._config.vocab_size
            and 0 <= batch.slots.min() <= batch.slots.max() < num_blocks * block_size
            and 0 <= batch.kv_indices.min() <= batch.kv_indices.max() < num_blocks
            and len(batch.kv_indices) == batch.kv_indptr[-1]
            and batch.num_tokens == batch.qo_indptr[-1] == len(batch.positions) == len(batch.slots)
            and batch.positions.min() >= 0
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
            window=config.sliding_window or 0,
            norm_eps=config.norm_eps,
            frequencies=weights.frequencies.data_ptr(),
            norm=weights.norm.data_ptr(),
            embedding=_matrix(weights.embedding),
            head=_matrix(weights.head),
            layers=layers,
        )


def _matrix(matrix: PackedMatrix) -> MatrixStruct:
    return MatrixStruct(
        values=matrix.values.data_ptr(),
        scales=None if matrix.scales is None else matrix.scales.data_ptr(),
        num_rows=matrix.num_rows,
        num_columns=matrix.num_columns,
    )
