"""The bench of the block index is right about what is held, with and without a peer to check it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.directory import away, trace
from tests.bench.directory.load import CHAIN_BLOCKS, NUM_WORKERS, Load
from tests.bench.directory.sides import Kvferry
from tests.bench.directory.works import Disagreement, Works, agree, replayed

MIXED = [[1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3, 7], [5, 6, 8], [9, 10, 11, 12]] * 3


def naive(plan: list[trace.Step]) -> list[dict[int, int]]:
    """What the lookups of a plan are to find."""
    held: dict[int, set[bytes]] = {}
    found = []
    for step in plan:
        if step.kind is trace.Kind.STORED:
            held.setdefault(step.worker, set()).update(step.hashes)
        elif step.kind is trace.Kind.REMOVED:
            assert set(step.hashes) <= held[step.worker], "a worker evicts what it does not hold"
            held[step.worker].difference_update(step.hashes)
        else:
            lengths = {}
            for worker, hashes in held.items():
                length = 0
                while length < len(step.hashes) and step.hashes[length] in hashes:
                    length += 1
                if length:
                    lengths[worker] = length
            found.append(lengths)
    return found


def test_a_trace_is_replayed_as_a_naive_index_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "NUM_WORKERS", 2)
    plan = trace.steps(MIXED)
    assert {step.kind for step in plan} == set(trace.Kind), "nothing was evicted"
    seconds, found = trace.replay(Kvferry(2, max_entries=1000), plan)
    assert found == naive(plan)
    assert min(seconds.values()) > 0


def test_a_trace_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "NUM_WORKERS", 2)
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{"hash_ids": {chain}}}\n' for chain in MIXED))
    rows = replayed(path, 1, with_peer=False)
    assert [row.work for row in rows] == ["trace: look up / allowed", "trace: stored / asked", "trace: removed / asked"]


def test_the_load_holds_what_it_says() -> None:
    load = Load(20_000)
    blocks: set[bytes] = set()
    for worker, chain in load.holdings():
        assert 0 <= worker < NUM_WORKERS
        blocks.update(chain)
    assert len(blocks) == load.num_blocks
    assert len(load.unknown()) == CHAIN_BLOCKS


def test_ours_alone_is_measured_against_the_fixed_goals() -> None:
    works = Works(20_000, 1, with_peer=False)
    assert len(works.memory()) == 1  # so little that the process may even have shrunk
    rows = [*works.lookup(), *works.ingest()]
    assert len(rows) == 5
    assert all(row.ours > 0 for row in rows)


def test_the_hit_rate_counts_tokens() -> None:
    asked = [away.Asked(0, 100, 90, ""), away.Asked(1, 300, 10, ""), away.Asked(2, 0, 0, "failed")]
    assert away._hit_rate(asked) == 0.25
    assert away._hit_rate([]) == 0


def test_sides_that_differ_are_noticed() -> None:
    agree([{1: 2}, {1: 2}])
    with pytest.raises(Disagreement):
        agree([{1: 2}, {1: 3}])
