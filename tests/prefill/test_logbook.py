"""What a transfer hid behind compute, from when things began and ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.prefill.logbook import ChunkTimes, Logbook


def test_what_ended_before_the_last_chunk_is_hidden() -> None:
    log = Logbook()
    log.computed(10.0, 2.0)
    first = log.posting(4, 12.1)
    log.computed(12.0, 2.0)
    second = log.posting(4, 14.1)
    log.computed(14.0, 2.0)
    third = log.posting(3, 16.1)
    log.written(first, 0.1, 0.5, 400)
    log.written(second, 0.1, 1.9, 400)  # goes on after the last chunk: not hidden
    log.written(third, 0.0, 0.2, 300)
    assert log.num_hidden_bytes() == 400
    assert (log.begun_s, log.computed_s, log.compute_s) == (10.0, 16.0, 6.0)
    assert log.chunks(8) == [
        ChunkTimes((10.0, 12.0), 4, (12.1 + 0.1, 12.1 + 0.1 + 0.5)),
        ChunkTimes((12.0, 14.0), 4, (14.1 + 0.1, 14.1 + 0.1 + 1.9)),
        ChunkTimes((14.0, 16.0), 3, (16.1, 16.1 + 0.2)),
    ]


def test_all_at_the_end_hides_nothing() -> None:
    log = Logbook()
    for number in range(4):
        log.computed(float(number), 1.0)
    log.written(log.posting(16, 4.0), 0.0, 1.0, 1600)
    assert log.num_hidden_bytes() == 0
    assert [chunk.num_blocks for chunk in log.chunks(8)] == [0, 0, 0, 16]
    assert [chunk.write_s for chunk in log.chunks(8)] == [None, None, None, (4.0, 5.0)]


def test_a_cached_prefix_is_written_before_a_chunk_was_computed() -> None:
    log = Logbook()
    cached = log.posting(8, 1.0)
    log.computed(1.0, 3.0)
    rest = log.posting(2, 4.0)
    log.written(cached, 0.0, 2.0, 800)
    log.written(rest, 0.0, 1.0, 200)
    assert log.num_hidden_bytes() == 800
    assert log.chunks(8) == [ChunkTimes((1.0, 4.0), 10, (1.0, 5.0))]


@given(st.integers(0, 300), st.integers(1, 40))
def test_joined_chunks_cover_all_and_stay_few(num_chunks: int, at_most: int) -> None:
    log = Logbook()
    for number in range(num_chunks):
        log.computed(float(number), 1.0)
        if number % 3:
            log.written(log.posting(number, number + 1.0), 0.0, 0.5, number)
    chunks = log.chunks(at_most)
    assert len(chunks) <= at_most
    assert sum(chunk.num_blocks for chunk in chunks) == sum(n for n in range(num_chunks) if n % 3)
    bounds = [bound for chunk in chunks for bound in chunk.compute_s]
    assert bounds == sorted(bounds)
    if chunks:
        assert (bounds[0], bounds[-1]) == (0.0, float(num_chunks))
