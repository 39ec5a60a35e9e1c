"""A digest tells what a block holds and where in the prompt it belongs, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.engine.digest import digest_blocks
from services.engine.layout import KvLayout

LAYOUT = KvLayout(model_revision="r", dtype="float32", block_size=4, num_layers=3, num_kv_heads=1, head_dim=2)
NUM_BLOCKS = 8

Pool = NDArray[np.uint8]


def pool_of(seed: int) -> Pool:
    return np.random.default_rng(seed).integers(0, 256, NUM_BLOCKS * LAYOUT.block_nbytes, dtype=np.uint8)


def digests(pool: Pool, blocks: list[int], first_index: int, num_tokens: int) -> list[int]:
    return digest_blocks(memoryview(pool), LAYOUT, blocks, first_index, num_tokens)


def by_token(pool: Pool) -> Pool:
    """[block, layer, key or value, token, bytes of one token], a view."""
    return pool.reshape(NUM_BLOCKS, LAYOUT.num_layers, 2, LAYOUT.block_size, -1)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(seed of the content, index of the first block sent, prompt tokens)."""
    num_tokens = draw(st.integers(1, NUM_BLOCKS * LAYOUT.block_size))
    num_blocks = -(-num_tokens // LAYOUT.block_size)
    return draw(st.integers(0, 2**32)), draw(st.integers(0, num_blocks - 1)), num_tokens


def sent(prompt: tuple[int, int, int]) -> int:
    _, first_index, num_tokens = prompt
    return -(-num_tokens // LAYOUT.block_size) - first_index


@given(prompts(), st.permutations(range(NUM_BLOCKS)))
def test_where_a_block_lies_does_not_matter(prompt: tuple[int, int, int], places: list[int]) -> None:
    seed, first_index, num_tokens = prompt
    here = pool_of(seed)
    there = np.zeros_like(here)
    by_token(there)[places] = by_token(here)
    count = sent(prompt)
    expected = digests(here, list(range(count)), first_index, num_tokens)
    assert len(set(expected)) == count
    assert digests(there, places[:count], first_index, num_tokens) == expected


@given(prompts(), st.data())
def test_every_byte_of_a_prompt_token_counts_and_no_other(prompt: tuple[int, int, int], data: st.DataObject) -> None:
    seed, first_index, num_tokens = prompt
    pool, count = pool_of(seed), sent(prompt)
    blocks = list(range(count))
    before = digests(pool, blocks, first_index, num_tokens)
    byte = data.draw(st.integers(0, count * LAYOUT.block_nbytes - 1))
    pool[byte] ^= data.draw(st.integers(1, 255))
    block, _, _, token, _ = np.unravel_index(byte, by_token(pool).shape)
    is_prompt = (first_index + block) * LAYOUT.block_size + token < num_tokens
    changed = [a != b for a, b in zip(before, digests(pool, blocks, first_index, num_tokens), strict=True)]
    assert changed == [b == block and is_prompt for b in blocks]


@given(prompts(), st.data())
def test_blocks_that_changed_places_are_noticed(prompt: tuple[int, int, int], data: st.DataObject) -> None:
    seed, first_index, num_tokens = prompt
    pool, blocks = pool_of(seed), list(range(sent(prompt)))
    moved = data.draw(st.permutations(blocks))
    pairs = zip(
        digests(pool, blocks, first_index, num_tokens), digests(pool, moved, first_index, num_tokens), strict=True
    )
    assert [a != b for a, b in pairs] == [a != b for a, b in zip(blocks, moved, strict=True)]


@given(st.integers(0, 2**32), st.integers(0, NUM_BLOCKS - 2))
def test_a_prefix_that_is_shifted_is_noticed(seed: int, first_index: int) -> None:
    """The same bytes, taken for the block after."""
    pool, num_tokens = pool_of(seed), NUM_BLOCKS * LAYOUT.block_size
    assert digests(pool, [0], first_index, num_tokens) != digests(pool, [0], first_index + 1, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 3, 4])
def test_the_definition_is_that_of_the_contract(num_tokens: int) -> None:
    """So that another implementation can tell what to compute; the wire depends on it."""
    pool = pool_of(1)
    content = np.ascontiguousarray(by_token(pool)[5, :, :, :num_tokens]).tobytes()
    assert digests(pool, [5], 2, 2 * LAYOUT.block_size + num_tokens) == [xxhash.xxh3_64_intdigest(content, seed=2)]


def test_a_block_behind_the_prompts_end_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="behind the end"):
        digests(pool_of(0), [0], 2, 8)
