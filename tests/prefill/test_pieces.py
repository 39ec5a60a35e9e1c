"""Pieces against a dense reference: every byte of the range, and none besides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.layout import KvLayout
from services.prefill.pieces import Pieces, Placement, pieces, stretches
from tests.prefill.pools import U8, region_nbytes, rows, sides, token_rows

LAYOUT = KvLayout("r", "float32", block_size=16, num_layers=3, num_kv_heads=2, head_dim=4)


def copy(batch: Pieces, source: U8, target: U8) -> None:
    for here, there, size in zip(batch.source_offsets, batch.target_offsets, batch.sizes, strict=True):
        assert 0 <= here <= here + size <= len(source)
        assert 0 <= there <= there + size <= len(target)
        target[there : there + size] = source[here : here + size]


@settings(max_examples=400)
@given(st.data())
def test_the_range_arrives_and_nothing_else_is_touched(data: st.DataObject) -> None:
    source, target, begin, end = data.draw(sides(same_dtype=True))
    random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    ours = random.integers(0, 256, region_nbytes(source), np.uint8)
    theirs = random.integers(0, 256, region_nbytes(target), np.uint8)
    expected = theirs.copy()
    if source.layout == target.layout:  # whole blocks
        size = source.layout.block_size
        for first in range(begin, end, size):
            block = rows(ours, source)[source.blocks[first // size]]
            rows(expected, target)[target.blocks[(first - target.first_token) // size]] = block
    else:
        for token in range(begin, end):
            token_rows(expected, target, token)[:] = token_rows(ours, source, token)
    (batch,) = pieces(source, target, begin, end)
    copy(batch, ours, theirs)
    assert (theirs == expected).all()
    written = batch.sizes.sum()
    covered = np.zeros(len(theirs), bool)
    for there, size in zip(batch.target_offsets, batch.sizes, strict=True):
        covered[there : there + size] = True
    assert covered.sum() == written, "a byte is written twice"
    if source.layout != target.layout:
        assert written == (end - begin) * target.layout.token_nbytes


def on_ranks(placement: Placement, kv: U8) -> list[U8]:
    """The regions of each rank, of [block, layer, key or value, token, head, bytes]."""
    before = np.zeros((placement.base,), np.uint8)
    return [
        np.concatenate([before, kv[..., heads.start : heads.stop, :].ravel()]) for heads in placement.layout.head_shares
    ]


@settings(max_examples=300)
@given(st.data())
def test_heads_arrive_whichever_ranks_have_them(data: st.DataObject) -> None:
    source, target, begin, end = data.draw(sides(same_dtype=True))
    num_heads = data.draw(st.integers(1, 5))
    ranks = st.integers(1, num_heads)
    ours, theirs = (replace(side.layout, num_kv_heads=num_heads, tp=data.draw(ranks)) for side in (source, target))
    source, target = replace(source, layout=ours), replace(target, layout=theirs)
    random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    item_nbytes = ours.row_nbytes // num_heads
    from_, to = (
        random.integers(0, 256, (len(side.blocks) + 3, *side.layout.block_shape[:4], item_nbytes), np.uint8)
        for side in (source, target)
    )
    expected = to.copy()
    size = theirs.block_size
    for token in range(begin, end):
        (here, here_at), (there, there_at) = (
            divmod(token - p.first_token, p.layout.block_size) for p in (source, target)
        )
        expected[target.blocks[there], :, :, there_at] = from_[source.blocks[here], :, :, here_at]
        if ours == theirs:  # whole blocks
            expected[target.blocks[there]] = from_[source.blocks[here]]
    our_regions, their_regions = on_ranks(source, from_), on_ranks(target, to)
    written = 0
    for batch in pieces(source, target, begin, end):
        copy(batch, our_regions[batch.source_rank], their_regions[batch.target_rank])
        written += int(batch.sizes.sum())
    for found, wanted in zip(their_regions, on_ranks(target, expected), strict=True):
        assert (found == wanted).all()
    num_blocks = -(-end // size) - begin // size if end > begin else 0
    whole = ours == theirs
    assert written == (num_blocks * theirs.block_nbytes if whole else (end - begin) * theirs.token_nbytes)


def test_a_rank_sends_to_those_that_have_its_heads() -> None:
    layout = replace(LAYOUT, num_kv_heads=3)
    two, three = replace(layout, tp=2), replace(layout, tp=3)

    def ways(ours: KvLayout, theirs: KvLayout) -> list[tuple[int, int, int]]:
        batches = pieces(Placement(ours, range(2)), Placement(theirs, range(2)), 0, 32)
        return [(batch.source_rank, batch.target_rank, len(batch.sizes)) for batch in batches]

    assert ways(layout, three) == [(0, rank, 32 * 6) for rank in range(3)]
    assert ways(three, layout) == [(rank, 0, 32 * 6) for rank in range(3)]
    assert ways(two, three) == [(0, 0, 32 * 6), (0, 1, 32 * 6), (1, 2, 2 * 6)], (
        "a stretch where the ranks have the same heads"
    )
    assert ways(three, three) == [(rank, rank, 2) for rank in range(3)], "whole blocks"


@settings(max_examples=200)
@given(sides(same_dtype=False))
def test_stretches_cover_the_range_within_one_block_on_each_side(drawn: tuple[Placement, Placement, int, int]) -> None:
    source, target, begin, end = drawn
    firsts, counts = stretches(source, target, begin, end)
    tokens = [t for first, count in zip(firsts, counts, strict=True) for t in range(first, first + count)]
    assert tokens == list(range(begin, end))
    for side in (source, target):
        size = side.layout.block_size
        assert ((firsts - side.first_token) // size == (firsts + counts - 1 - side.first_token) // size).all()
    cut = {t for t in range(begin + 1, end) for side in (source, target)
           if (t - side.first_token) % side.layout.block_size == 0}  # fmt: skip
    assert len(firsts) == (len(cut) + 1 if begin < end else 0), "cut where no block begins"


def test_equal_layouts_give_one_piece_per_block() -> None:
    source, target = Placement(LAYOUT, (5, 2, 7)), Placement(LAYOUT, (1, 0), first_token=16)
    (batch,) = pieces(source, target, 16, 37)
    nbytes = LAYOUT.block_nbytes
    assert batch.source_offsets.tolist() == [2 * nbytes, 7 * nbytes]
    assert batch.target_offsets.tolist() == [nbytes, 0]
    assert batch.sizes.tolist() == [nbytes, nbytes]


@pytest.mark.parametrize(("size", "num_stretches"), [(32, 2), (8, 4), (12, 4)])
def test_unequal_sizes_give_one_piece_per_stretch_layer_and_half(size: int, num_stretches: int) -> None:
    target = Placement(replace(LAYOUT, block_size=size), range(4))
    (batch,) = pieces(Placement(LAYOUT, range(2)), target, 0, 32)
    assert len(batch.sizes) == num_stretches * LAYOUT.num_layers * 2


def test_a_range_that_begins_inside_an_equal_block_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        pieces(Placement(LAYOUT, range(2)), Placement(LAYOUT, range(2)), 3, 20)
    with pytest.raises(AssertionError):
        pieces(Placement(LAYOUT, range(2)), Placement(LAYOUT, range(2), first_token=16), 0, 32)
