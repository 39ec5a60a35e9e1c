"""A request's phases on one axis, and their bars."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry._phases import phases
from kvferry.cli.bars import axis, bar
from kvferry.cli.timeline import rows
from kvferry.types import ChunkTimes, DecodeStats, PrefillStats, PullStats, Timeline, TransferStats, Usage

SPLIT = Timeline(
    tokenize_s=0.5,
    route_s=0.25,
    ttft_s=10.0,
    total_s=20.0,
    itl_p50_s=1.0,
    itl_p99_s=1.0,
    prefill_worker="prefill-0",
    decode_worker="decode-0",
    prefill=PrefillStats(queue_s=1.0, compute_s=6.0, num_prompt_tokens=48, num_cached_tokens=0, num_chunks=3),
    transfer=TransferStats(
        num_blocks=3,
        num_bytes=300,
        busy_s=1.5,
        exposed_s=1.0,
        path="mapped",
        verify_s=0,
        num_hidden_bytes=100,
        chunks=(
            ChunkTimes(0.0, 2.0, 1, 2.0, 2.5),
            ChunkTimes(2.0, 4.0, 0, None, None),
            ChunkTimes(4.0, 6.0, 2, 6.0, 6.5),
        ),
    ),
    decode=DecodeStats(
        wait_for_kv_s=7.0,
        compute_s=8.0,
        num_steps=8,
        num_cached_tokens=0,
        prefilled_locally=False,
        num_preemptions=0,
        first_step_s=0.5,
    ),
    num_retries=0,
    route_reason="",
    opened_s=1.0,
    ticket_s=2.0,
)


def test_a_split_request() -> None:
    assert {phase.name: phase.spans for phase in phases(SPLIT)} == {
        "tokenize": ((0.0, 0.5),),
        "route": ((0.75, 1.0),),
        "ticket": ((1.0, 2.0),),
        "prefill queue": ((2.0, 3.0),),
        "prefill compute": ((3.0, 5.0), (5.0, 7.0), (7.0, 9.0)),
        "KV written": ((5.0, 5.5), (9.0, 9.5)),
        "exposed transfer": ((9.0, 10.0),),
        "first token (TTFT)": ((10.0, 10.0),),
        "decode compute": ((10.5, 20.0),),
    }
    assert SPLIT.handover_s == 1.5


def test_computed_where_it_is_decoded() -> None:
    assert SPLIT.decode is not None
    decode = dataclasses.replace(SPLIT.decode, first_step_s=None)
    alone = dataclasses.replace(SPLIT, ticket_s=None, transfer=None, prefill_worker="", decode=decode)
    assert alone.handover_s is None
    assert {phase.name: phase.spans for phase in phases(alone)} == {
        "tokenize": ((0.0, 0.5),),
        "route": ((0.75, 1.0),),
        "prefill queue": ((1.0, 2.0),),
        "prefill compute": ((2.0, 8.0),),
        "first token (TTFT)": ((10.0, 10.0),),
        "decode compute": ((8.0, 20.0),),
    }


def test_one_token_needs_no_decode_step() -> None:
    assert SPLIT.decode is not None
    one = dataclasses.replace(SPLIT, decode=dataclasses.replace(SPLIT.decode, num_steps=0, first_step_s=None))
    assert one.handover_s is None
    assert "decode compute" not in {phase.name for phase in phases(one)}


@pytest.mark.parametrize(
    ("spans", "drawn"),
    [
        ([(0, 5), (5, 10)], "#####====="),
        ([(2, 2.001)], "  #       "),
        ([(2, 2)], "  #       "),
        ([(0, 1.5), (1.5, 3), (6, 7)], "#==   #   "),
        ([(9.99, 10)], "         #"),
        ([(10, 11)], "         #"),
        ([], "          "),
    ],
)
def test_bars(spans: list[tuple[float, float]], drawn: str) -> None:
    assert bar(spans, 10.0, 10) == drawn


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30))), st.floats(0, 20))
def test_a_bar_never_leaves_its_cells(spans: list[tuple[float, float]], total_s: float) -> None:
    assert len(bar([(min(s), max(s)) for s in spans], total_s, 60)) == 60


def test_the_axis() -> None:
    assert axis(2.5, 12) == "0-----2.50 s"
    assert axis(0.0125, 12) == "0----12.5 ms"


def test_a_pull_comes_before_the_queue() -> None:
    assert SPLIT.prefill is not None
    for outcome, num_blocks, detail in (
        ("pulled", 2, "2 blocks, 4,096 bytes (4.0 KiB) from decode-1"),
        ("late", 0, "nothing from decode-1: late"),
    ):
        pull = PullStats("decode-1", outcome, num_blocks, 2048 * num_blocks, elapsed_s=0.5, busy_s=0.125)
        timeline = dataclasses.replace(SPLIT, prefill=dataclasses.replace(SPLIT.prefill, pull=pull))
        spans = {phase.name: phase.spans for phase in phases(timeline)}
        assert spans["pull"] == ((2.0, 2.5),)
        assert spans["prefill queue"] == ((2.5, 3.5),)
        assert spans["prefill compute"][0] == (3.5, 5.5)
        told = {stage: (time, what) for stage, time, what in rows(timeline, Usage(48, 9, 0))}
        assert told["pull"] == ("500.0 ms", detail)
