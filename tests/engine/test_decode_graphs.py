"""Decoding by padded buckets against sums over dense sequences, in every type."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.attention.flashinfer_attention import AttentionShape
from services.engine.batch import Batch, Entry, build_batch
from services.engine.buckets import bucket_sizes
from services.engine.decode_graphs import DecodeGraphs
from services.engine.layout import KvLayout
from services.engine.model import Inputs, LlamaModel
from services.engine.model_config import ModelConfig
from services.engine.operations.flashinfer_operations import FlashInferOperations
from services.engine.operations.torch_operations import TorchOperations
from services.engine.weights import DTYPES, Weights
from tests.engine.fake_device import FakeDevice
from tests.engine.test_kernels import make_config, make_weights

CPU = torch.device("cpu")
MAX_CONTEXT = 40
# Of the reference's length, by how much logits may differ: its sums are of the same numbers, but in float32.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}


@dataclass(frozen=True, slots=True, repr=False)
class Case:
    """``steps``: batches of single tokens, and of each sequence what is computed before, [layers, 2, tokens, kv_heads,
    dim]."""

    config: ModelConfig
    sizes: tuple[int, ...]
    page_size: int
    num_blocks: int
    steps: list[tuple[Batch, list[torch.Tensor]]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    config = make_config(
        sharing=draw(st.sampled_from([1, 3, 4, 7, 8])), num_kv_heads=draw(st.sampled_from([1, 2])), head_dim=16,
        hidden_size=24, inner=20, vocab_size=37, window=draw(st.sampled_from([None, 1, 9, 1000])),
    )  # fmt: skip
    sizes, page_size = bucket_sizes(draw(st.integers(1, 12))), draw(st.sampled_from([1, 4, 16]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    steps = []
    most = 0
    for contexts in draw(
        st.lists(st.lists(st.integers(0, MAX_CONTEXT), min_size=1, max_size=sizes[-1]), min_size=1, max_size=2)
    ):
        counts = [context // page_size + 1 for context in contexts]
        free = random.permutation(sum(counts) + 1).tolist()
        most = max(most, len(free))
        entries = [
            Entry([int(random.integers(config.vocab_size))], context, [free.pop() for _ in range(count)], None)
            for context, count in zip(contexts, counts, strict=True)
        ]
        shape = (config.num_kv_heads, config.head_dim)
        texts = [
            torch.from_numpy(random.standard_normal((config.num_layers, 2, context, *shape))) for context in contexts
        ]
        steps.append((build_batch(entries, page_size), texts))
    return Case(config, sizes, page_size, most, steps)


class Dense:
    """Attention of one new token a sequence over all of it, in float64; ``stored``: each layer's keys and values."""

    def __init__(self, texts: list[torch.Tensor], window: int | None) -> None:
        self._texts, self._window = texts, window
        self.stored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor) -> None:
        self.stored.append((key, value))

    def run(self, queries: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        layer = len(self.stored) - 1
        found = torch.empty_like(queries)
        for row, text in enumerate(self._texts):
            key, value = (
                torch.cat((text[layer, half].double(), new[row : row + 1].double()))[-(self._window or 10**9) :]
                for half, new in enumerate(self.stored[layer])
            )
            group = queries.shape[1] // key.shape[1]
            for head in range(queries.shape[1]):
                scores = key[:, head // group] @ queries[row, head].double() / math.sqrt(queries.shape[-1])
                found[row, head] = scores.softmax(0) @ value[:, head // group]
        return found


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    layers = [
        replace(
            layer, **{f.name: part.to(dtype) for f in fields(layer) if (part := getattr(layer, f.name)) is not None}
        )
        for layer in weights.layers
    ]
    embedding = weights.embedding.to(dtype)
    return Weights(embedding, tuple(layers), weights.norm.to(dtype), embedding)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(case=cases())
def test_any_decode_equals_the_dense_sum(dtype: str, case: Case) -> None:
    """Every slot that holds no token is NaN, and is after; the batch before leaves nothing behind."""
    config, kind = case.config, DTYPES[dtype]
    weights = cast(make_weights(config), kind)
    layout = KvLayout(config.revision, dtype, case.page_size, config.num_layers, config.num_kv_heads, config.head_dim)
    arena = torch.full((case.num_blocks, *layout.block_shape), math.nan, dtype=kind)
    device = FakeDevice()
    shape = AttentionShape(
        config.num_heads, config.num_kv_heads, config.head_dim, case.page_size, config.sliding_window, kind
    )
    with device.current(), torch.inference_mode():
        model = LlamaModel(config, weights, FlashInferOperations(config, device.kernels, CPU))
        graphs = DecodeGraphs(
            model, arena, shape, device.kernels, device, torch.zeros(16, dtype=torch.uint8), case.sizes,
            MAX_CONTEXT // case.page_size + 1,
        )  # fmt: skip
        graphs.capture()
        reference = LlamaModel(config, cast(weights, torch.float32), TorchOperations(config, CPU, torch.float32))
        for batch, texts in case.steps:
            arena.fill_(math.nan)
            rounded = [text.to(kind) for text in texts]
            for number, text in enumerate(rounded):
                pages = batch.kv_indices[batch.kv_indptr[number] : batch.kv_indptr[number + 1]]
                for position in range(text.shape[2]):
                    arena[pages[position // case.page_size], :, :, position % case.page_size] = text[:, :, position]
            before = arena.clone()
            found = graphs.run(graphs.prepare(batch), batch).float()
            dense = Dense(rounded, config.sliding_window)
            inputs = Inputs(torch.from_numpy(batch.token_ids), torch.from_numpy(batch.positions), None)
            expected = reference.forward(inputs, torch.empty(1, config.num_layers), dense)
            assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()
            pages, offsets = (torch.from_numpy(part) for part in np.divmod(batch.slots, case.page_size))
            for layer, halves in enumerate(dense.stored):
                for half, new in enumerate(halves):
                    stored = arena[pages, layer, half, offsets].float()
                    assert (stored - new).norm() <= TOLERANCE[dtype] * new.norm()
                    arena[pages, layer, half, offsets] = before[pages, layer, half, offsets]
            assert torch.equal(arena.nan_to_num(7), before.nan_to_num(7))
