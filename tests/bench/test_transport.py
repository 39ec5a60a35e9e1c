"""The bench's own arithmetic: ratios point the right way, and a block that went astray is seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench.transport.pattern import Arrival, fill, last_word, num_wrong
from tests.bench.transport.report import write_json
from tests.bench.transport.rows import less_is_better, more_is_better, within


def test_a_rate_twice_the_peers_is_twice_as_good() -> None:
    row = more_is_better("write", [8.0, 8.0, 8.0], [4.0, 4.0, 4.0], 2.0, "GB/s")
    assert (row.ours, row.peer, row.ratio, row.is_met) == (8.0, 4.0, 2.0, True)


def test_half_the_peers_time_is_twice_as_good() -> None:
    row = less_is_better("latency", [20.0, 20.0, 20.0], [40.0, 40.0, 40.0], 2.5, "us")
    assert (row.ours, row.peer, row.ratio, row.is_met) == (20.0, 40.0, 2.0, False)
    assert row.unit == "us, less is better"


def test_a_limit_is_kept_by_the_median() -> None:
    assert within("allocate", [0.5, 0.9, 7.0], 1.0, "s").is_met
    assert not within("allocate", [0.5, 1.1, 1.9], 1.0, "s").is_met


def test_the_ratio_is_taken_round_by_round() -> None:
    """A machine that is slower in some rounds is so for both, and the ratio stays."""
    row = more_is_better("write", [8.0, 2.0, 2.0], [4.0, 1.0, 4.0], 1.0, "GB/s")
    assert (row.ratio, row.ours / row.peer) == (2.0, 0.5)


def test_rounds_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        more_is_better("write", [8.0, 8.0], [4.0], 1.0, "GB/s")


def test_json_rows(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "transport.json"
    write_json([within("posting", [0.25], 1.0, "us")], path)
    assert json.loads(path.read_text()) == [
        {"work": "posting", "ours": 0.25, "peer": 1.0, "ratio": 4.0, "goal": 1.0, "unit": "us, less is better"}
    ]


def test_every_block_is_looked_at() -> None:
    source, pool = np.zeros((4, 64), np.uint8), np.zeros((4, 64), np.uint8)
    fill(source, 1)
    fill(pool, 2)
    arrivals = [Arrival(1, of=[3, 0], to=[1, 2])]
    assert num_wrong(pool, arrivals, 2) == 2  # nothing has arrived
    pool[[1, 2]] = source[[3, 0]]
    assert num_wrong(pool, arrivals, 2) == 0
    pool[3, 63] ^= 1  # a stray byte where nothing should have come
    assert num_wrong(pool, arrivals, 2) == 1
    assert num_wrong(pool, arrivals) == 0  # without the salt, only what should have come is looked at
    pool[[1, 2]] = source[[0, 3]]  # the right blocks in the wrong places
    assert num_wrong(pool, arrivals) == 2


def test_last_word_is_what_a_filled_block_ends_with() -> None:
    pool = np.zeros((3, 64), np.uint8)
    fill(pool, 5)
    assert last_word(64, 5, 2) == int(pool.view(np.uint64)[2, -1])
    fill(pool, 6, [2])
    assert last_word(64, 6, 2) == int(pool.view(np.uint64)[2, -1])
