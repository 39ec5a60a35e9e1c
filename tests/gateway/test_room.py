"""Whether a decode worker has blocks for one more, by what it reported."""

from __future__ import annotations

import pytest

from gateway.candidates import Abilities, Candidate
from gateway.costs import Costs, Demand, num_needed_blocks
from gateway.pending import Pending
from gateway.worker_state import seen_now, to_candidate
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from services.directory.index import Prefix
from services.runtime.place import NOWHERE


def decode(load: directory_pb2.WorkerLoad, pending: Pending | None = None) -> Candidate:
    """A pool of 40 blocks of 16 tokens: 20 are free or cached, 8 lent."""
    load.blocks.CopyFrom(common_pb2.BlockCounts(total=40, free=12, cached=8, active=12, lent=8))
    info = directory_pb2.WorkerInfo(
        worker_id="d", incarnation=1, role=common_pb2.WORKER_ROLE_DECODE, layout=common_pb2.Layout(block_size_tokens=16)
    )
    worker = directory_pb2.WorkerState(info=info, load=load)
    return seen_now(to_candidate(worker, Abilities(), NOWHERE), Prefix(0, 0), pending or Pending())


def test_what_is_there_may_grow_and_what_was_sent_will_come() -> None:
    assert decode(directory_pb2.WorkerLoad(num_running=6, num_growth_blocks=0)).num_free_blocks == 20
    load = directory_pb2.WorkerLoad(num_running=6, num_growth_blocks=9)
    assert decode(load).num_free_blocks == 11
    assert decode(load, Pending(num_requests=1, num_blocks=4)).num_free_blocks == 7
    assert decode(directory_pb2.WorkerLoad(num_growth_blocks=50)).num_free_blocks == 0


def test_of_a_worker_that_does_not_say_each_answer_is_halfway() -> None:
    assert decode(directory_pb2.WorkerLoad(num_running=6)).num_free_blocks == 20 - 6 * 2


@pytest.mark.parametrize(
    ("max_tokens", "expected_tokens", "needed"),
    [(1000, 320, 24), (1000, 240, 19), (16, 320, 5), (1, 320, 5), (1000, 0, 8)],
)
def test_a_newcomer_needs_its_answers_blocks_too(max_tokens: int, expected_tokens: int, needed: int) -> None:
    worker = decode(directory_pb2.WorkerLoad(num_growth_blocks=0, num_expected_answer_tokens=expected_tokens))
    demand = Demand(num_prompt_tokens=64, max_tokens=max_tokens)
    assert num_needed_blocks(worker, demand) == needed
    assert Costs([worker], demand).is_full(worker) == (needed > 20)
