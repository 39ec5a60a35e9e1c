"""FLOPs and bytes from shapes, against a count one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.phases import Ceilings, Demand, ModelShape, Piece, demand_of, split_demand

SHAPE = ModelShape(
    num_layers=2, hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=3, intermediate_size=20, vocab_size=31,
    window=None, weight_nbytes=2.0, head_weight_nbytes=3.0, kv_nbytes=2,
)  # fmt: skip


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    num_new = draw(st.integers(1, 9))
    return Piece(num_new, num_new + draw(st.integers(0, 12)), draw(st.integers(0, num_new)))


shapes = st.builds(
    lambda layers, groups, kv_heads, window: replace(
        SHAPE, num_layers=layers, num_heads=groups * kv_heads, num_kv_heads=kv_heads, window=window
    ),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.none() | st.integers(1, 15),
)  # fmt: skip


def matmul_flops(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def naive(shape: ModelShape, step: list[Piece]) -> Demand:
    flops, kv_read, kv_written = 0, 0, 0
    h, d = shape.hidden_size, shape.head_dim
    weights: set[tuple[object, ...]] = set()
    gathered = 0
    for sequence, piece in enumerate(step):
        seen: set[tuple[int, int]] = set()
        for position in range(piece.context - piece.num_new, piece.context):
            gathered += h
            for layer in range(shape.num_layers):
                for name, inputs, outputs in (
                    ("q", h, shape.num_heads * d), ("k", h, shape.num_kv_heads * d), ("v", h, shape.num_kv_heads * d),
                    ("o", shape.num_heads * d, h), ("gate", h, shape.intermediate_size),
                    ("up", h, shape.intermediate_size), ("down", shape.intermediate_size, h),
                ):  # fmt: skip
                    flops += matmul_flops(1, inputs, outputs)
                    weights.add((layer, name, inputs * outputs))
                first = 0 if shape.window is None else max(0, position + 1 - shape.window)
                for other in range(first, position + 1):
                    flops += shape.num_heads * (matmul_flops(1, d, 1) + matmul_flops(1, 1, d))
                    seen.add((layer, other))
                kv_written += 2 * shape.num_kv_heads * d * shape.kv_nbytes
        kv_read += len(seen) * 2 * shape.num_kv_heads * d * shape.kv_nbytes
        for _ in range(piece.num_samples):
            flops += matmul_flops(1, h, shape.vocab_size)
            weights.add(("head", sequence * 0, h * shape.vocab_size))
    num_head = sum(int(str(size)) for name, _, size in weights if name == "head") + gathered
    num_body = sum(int(str(size)) for name, _, size in weights if name != "head")
    weight_bytes = num_body * shape.weight_nbytes + num_head * shape.head_weight_nbytes
    return Demand(flops, weight_bytes, kv_read, kv_written)


@given(shapes, st.lists(pieces(), min_size=1, max_size=5))
def test_a_step_demands_what_a_count_one_by_one_says(shape: ModelShape, step: list[Piece]) -> None:
    found, expected = demand_of(shape, step), naive(shape, step)
    assert (found.flops, found.kv_read_bytes, found.kv_written_bytes) == (
        expected.flops, expected.kv_read_bytes, expected.kv_written_bytes,
    )  # fmt: skip
    assert found.weight_bytes == pytest.approx(expected.weight_bytes)
    assert found.nbytes == pytest.approx(expected.nbytes)


@given(shapes, st.lists(pieces(), max_size=4), st.lists(pieces(), max_size=4))
def test_two_parts_of_a_step_demand_what_the_step_does(shape: ModelShape, one: list[Piece], other: list[Piece]) -> None:
    first, second = split_demand(shape, one, other)
    total, whole = first + second, demand_of(shape, [*one, *other])
    for name in ("flops", "weight_bytes", "kv_read_bytes", "kv_written_bytes"):
        assert getattr(total, name) == pytest.approx(getattr(whole, name))
    assert min(first.nbytes, second.nbytes, first.flops, second.flops) >= 0
    assert (first == Demand()) == (not one)


def test_a_long_prompt_is_bound_by_compute_and_a_lone_token_by_memory() -> None:
    llama_8b = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, None, 2.0, 2.0, 2)
    assert llama_8b.num_body_weights + llama_8b.num_head_weights == pytest.approx(7.5e9, rel=0.01)  # embedding besides
    assert llama_8b.kv_token_nbytes == 131072
    h100 = Ceilings(flops_per_s=989e12, bytes_per_s=3.35e12)
    prefill, decode = (demand_of(llama_8b, [piece]) for piece in (Piece(2048, 2048, 1), Piece(1, 2048, 1)))
    assert prefill.intensity > h100.flops_per_s / h100.bytes_per_s > 100 * decode.intensity
    assert h100.seconds(prefill) == prefill.flops / h100.flops_per_s
    assert h100.seconds(decode) == decode.nbytes / h100.bytes_per_s
    assert h100.mfu(98.9e12) == pytest.approx(0.1)
    assert h100.mbu(3.35e12) == 1.0
    assert Ceilings().mfu(1.0) == Ceilings().mbu(1.0) == 0.0
