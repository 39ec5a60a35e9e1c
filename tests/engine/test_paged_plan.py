"""The step's metadata, and FlashInfer's attention that is planned with it, against sums over dense sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.attention.base import Attention
from services.engine.attention.flashinfer_attention import AttentionShape, FlashInferAttention
from services.engine.attention.paged_plan import plan_pages
from services.engine.attention.torch_attention import TorchAttention
from services.engine.batch import Batch, Entry, build_batch
from services.engine.flashinfer_kernels import FlashInfer
from tests.engine import fake_flashinfer

F64 = npt.NDArray[np.float64]
NUM_LAYERS, LAYER = 2, 1
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, repr=False)
class Case:
    """``texts``: of each sequence all keys and values, [2, tokens, kv_heads, dim], and how many tokens are new."""

    batch: Batch
    arena: torch.Tensor
    texts: list[tuple[F64, int]]
    queries: torch.Tensor
    window: int | None
    page_size: int


@dataclass(frozen=True, slots=True)
class Attended:
    """``error``: how far any number is from the dense sum.  ``other_layer``: of the pool, which nobody should touch."""

    error: float
    other_layer: torch.Tensor


GROUPS = (1, 3, 4, 7, 8)
WINDOWS = (None, None, 1, 9, 1000)
NUMS_NEW = (1, 1, 1, 2, 19)


@st.composite
def cases(draw: st.DrawFn, groups: Sequence[int] = GROUPS, head_dims: Sequence[int] = (64, 128),
          windows: Sequence[int | None] = WINDOWS, nums_new: Sequence[int] = NUMS_NEW) -> Case:  # fmt: skip
    """Sequences in the scheduler's order or in any other; some begin with blocks of the first one, all of them computed.
    Whatever is not a token computed before is NaN: the new ones' places, too."""
    group, num_kv_heads = draw(st.sampled_from(groups)), draw(st.sampled_from([1, 2]))
    head_dim, page_size = draw(st.sampled_from(head_dims)), draw(st.sampled_from([8, 16, 32]))
    window = draw(st.sampled_from(windows))
    shapes = draw(st.lists(st.tuples(st.integers(0, 70), st.sampled_from(nums_new)), min_size=1, max_size=6))
    if draw(st.booleans()):
        shapes.sort(key=lambda shape: shape[1] > 1)
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    lengths = [start + num_new for start, num_new in shapes]
    num_blocks = sum(-(-length // page_size) for length in lengths) + 3
    free = random.permutation(num_blocks).tolist()
    arena = torch.full((num_blocks, NUM_LAYERS, 2, page_size, num_kv_heads, head_dim), math.nan)
    entries: list[Entry] = []
    texts: list[tuple[F64, int]] = []
    for (start, num_new), length in zip(shapes, lengths, strict=True):
        text = random.standard_normal((2, length, num_kv_heads, head_dim))
        num_shared = 0
        if texts and draw(st.booleans()):
            num_shared = min(start, shapes[0][0]) // page_size
            text[:, : num_shared * page_size] = texts[0][0][:, : num_shared * page_size]
        table = [*(entries[0].block_table[:num_shared] if num_shared else ())]
        table += [free.pop() for _ in range(-(-length // page_size) - num_shared)]
        for position in range(num_shared * page_size, start):
            arena[table[position // page_size], LAYER, :, position % page_size] = torch.from_numpy(text[:, position])
        entries.append(Entry([0] * num_new, start, table, None))
        texts.append((text, num_new))
    batch = build_batch(entries, page_size)
    queries = random.standard_normal((batch.num_tokens, group * num_kv_heads, head_dim)).astype(np.float32)
    return Case(batch, arena, texts, torch.from_numpy(queries), window, page_size)


def torch_attention(case: Case, place: torch.device) -> TorchAttention:
    return TorchAttention(block_size=case.page_size, sliding_window=case.window, device=place)


def flashinfer_attention(case: Case, dtype: torch.dtype, kernels: FlashInfer, workspace: torch.Tensor
                         ) -> FlashInferAttention:  # fmt: skip
    """Where ``workspace`` is."""
    num_kv_heads, head_dim = case.arena.shape[-2:]
    shape = AttentionShape(case.queries.shape[1], num_kv_heads, head_dim, case.page_size, case.window, dtype)
    return FlashInferAttention(shape, kernels, workspace.device, workspace)


def attend(case: Case, attention: Attention, place: torch.device, dtype: torch.dtype, *, stale: float) -> Attended:
    """``stale``: in every slot that holds no token."""
    plan = attention.plan(case.batch)
    new = np.concatenate([text[:, text.shape[1] - num_new :] for text, num_new in case.texts], axis=1)
    key, value = torch.from_numpy(new).to(place, dtype)
    arena = case.arena.nan_to_num(stale).to(place, dtype)
    plan.append(key, value, arena[:, LAYER])
    found = plan.run(case.queries.to(place, dtype), arena[:, LAYER])
    return Attended(float(np.abs(found.double().cpu().numpy() - dense_sum(case)).max()), arena[:, 1 - LAYER])


def dense_sum(case: Case) -> F64:
    """Every query over every key, [T, heads, dim], in float64."""
    found = []
    rows = iter(case.queries.double().numpy())
    for text, num_new in case.texts:
        length = text.shape[1]
        for position in range(length - num_new, length):
            query = next(rows)
            first = 0 if case.window is None else max(0, position - case.window + 1)
            keys, values = text[:, first : position + 1]
            group = len(query) // keys.shape[1]
            heads = []
            for head, vector in enumerate(query):
                scores = keys[:, head // group] @ vector / math.sqrt(len(vector))
                weights = np.exp(scores - scores.max())
                heads.append(weights / weights.sum() @ values[:, head // group])
            found.append(heads)
    return np.array(found)


@pytest.mark.parametrize("kind", ["torch", "flashinfer"])
@settings(max_examples=60)
@given(case=cases())
def test_any_batch_equals_the_dense_sum(kind: str, case: Case) -> None:
    attention: Attention = torch_attention(case, CPU)
    if kind == "flashinfer":
        attention = flashinfer_attention(case, torch.float32, fake_flashinfer, torch.zeros(16, dtype=torch.uint8))
    attended = attend(case, attention, CPU, torch.float32, stale=math.nan)
    assert attended.error < 1e-4
    assert attended.other_layer.isnan().all()


@settings(max_examples=60)
@given(case=cases())
def test_every_sequence_is_decoded_or_in_a_chunk_and_nothing_is_both(case: Case) -> None:
    pages = plan_pages(case.batch)
    decoded = 0 if pages.decode is None else pages.decode.end
    lengths = np.diff(case.batch.qo_indptr).tolist()
    parts = [part for part in (pages.decode, pages.prefill) if part is not None]
    assert [part.begin for part in parts] == [0, decoded][: len(parts)]
    assert parts[-1].end == case.batch.num_tokens
    assert lengths[:decoded] == [1] * decoded
    assert lengths[decoded : decoded + 1] != [1] or decoded == len(lengths)
    assert np.concatenate([np.diff(part.qo_indptr) for part in parts]).tolist() == lengths
    assert np.concatenate([part.kv_indices for part in parts]).tolist() == case.batch.kv_indices.tolist()
    assert np.concatenate([part.kv_last_page_len for part in parts]).tolist() == case.batch.kv_last_page_len.tolist()
    assert np.bincount(pages.sequences, minlength=len(lengths)).tolist() == lengths
    assert pages.positions.tolist() == case.batch.positions.tolist()
    for part in (pages.whole, *parts):
        assert part.qo_indptr[0] == part.kv_indptr[0] == 0
        assert part.kv_indptr[-1] == len(part.kv_indices)
        assert {a.dtype for a in (part.qo_indptr, part.kv_indptr, part.kv_indices, part.kv_last_page_len)} == {
            np.dtype("int32")
        }


def test_groups_that_cuda_cores_have_not_go_to_tensor_cores() -> None:
    for group, uses in {1: False, 3: False, 4: True, 5: True, 7: True, 8: True}.items():
        assert AttentionShape(2 * group, 2, 64, 16, None, torch.bfloat16).uses_tensor_cores == uses
