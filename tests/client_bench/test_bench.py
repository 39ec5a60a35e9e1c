"""kvferry bench: its pure parts by properties, its runner against doors that stall, the command against a gRPC server."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvferry import errors
from kvferry.bench import arrivals, lengths, slo, workload
from kvferry.bench.doors import Target
from kvferry.bench.plots import HEIGHT, MAX_POINTS, WIDTH, Line, plot
from kvferry.bench.record import Record, percentile
from kvferry.bench.runner import Outcome, Runner
from kvferry.bench.statistics import summarize
from kvferry.cli import make_app
from kvferry.cli.figures import bottleneck
from tests.sdk.fake_gateway import FakeGateway, answer, refuse

APP = make_app(rich=False)
ASK = workload.Ask(0.0, 3, 2)
TIMES = st.floats(0, 1e3)
PROMPTS = workload.Prompts(50_000, seed=3)


@st.composite
def records(draw: st.DrawFn) -> Record:
    scheduled = draw(TIMES)
    times = list(itertools.accumulate(draw(st.lists(st.floats(0, 5), min_size=2, max_size=8)), initial=scheduled))
    return Record(
        scheduled, times[1], times[-1], 4, tuple(times[2:]), draw(st.sampled_from([None, None, "OVERLOADED"]))
    )


@given(st.lists(TIMES, min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], rank: float) -> None:
    assert percentile(sorted(values), rank) == pytest.approx(float(np.percentile(values, rank)), abs=1e-9)


@given(st.lists(records(), max_size=20), st.floats(0, 10), st.floats(0, 5))
def test_goodput_is_part_of_throughput(made: list[Record], ttft: float, itl: float) -> None:
    summary = summarize(made, slo.Slo(ttft=ttft, itl=itl))
    assert summary.goodput_per_s <= summary.requests_per_s
    assert 0 <= summary.attained <= 1
    assert summary.num_completed + sum(summary.errors.values()) == summary.num_requests == len(made)
    assert summary.max_open <= len(made)
    if summary.ttft is not None:
        assert summary.ttft.p50 <= summary.ttft.p90 <= summary.ttft.p99 <= summary.ttft.max
    assert summarize(made, slo.Slo()).goodput_per_s == summary.requests_per_s


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    times = np.array(list(itertools.islice(arrivals.gamma(5.0, burstiness, 1), 20_000)))
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.15)
    assert times.tolist() == list(itertools.islice(arrivals.gamma(5.0, burstiness, 1), 20_000))


def test_a_trace_keeps_its_gaps_scaled() -> None:
    assert list(arrivals.scaled([7.0, 8.0, 11.0], 2.0)) == [0.0, 0.5, 2.0]
    assert list(itertools.islice(arrivals.constant(4.0), 3)) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("text", ["5", "uniform:2:9", "normal:4:9", "lognormal:30:0.5"])
def test_lengths_are_at_least_one(text: str) -> None:
    drawn = random.Random(1)
    assert all(lengths.parse(text)(drawn) >= 1 for _ in range(500))


@pytest.mark.parametrize("text", ["", "0", "uniform:9:2", "normal:4", "zipf:1:2", "normal:nan:1"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match="is no length"):
        lengths.parse(text)


def test_objectives() -> None:
    assert slo.parse("ttft=500ms,itl=50ms") == slo.Slo(ttft=0.5, itl=0.05)
    for wrong in ("ttft=5", "ttft=1s,ttft=2s", "speed=1s", ""):
        with pytest.raises(errors.InvalidRequestError, match="is no objective"):
            slo.parse(wrong)


def test_mooncake_prompts_share_what_their_hashes_share(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    entries = [
        {"timestamp": 2500, "input_length": 1100, "output_length": 3, "hash_ids": [7, 8, 9]},
        {"timestamp": 1000, "input_length": 1030, "output_length": 4, "hash_ids": [7, 8, 10]},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    first, second = workload.read_trace(path)
    assert (first.at_s, first.num_prompt_tokens, second.num_output_tokens) == (1.0, 1030, 3)
    prompts = workload.Prompts(50_000, seed=1)
    a, b = prompts.make(first, 0), prompts.make(second, 1)
    assert (len(a), len(b)) == (1030, 1100)
    assert a[:1024] == b[:1024]
    assert a[1024:] != b[1024:1030]
    path.write_text('{"timestamp": 1}\n')
    with pytest.raises(errors.InvalidRequestError, match="entry 1 is neither"):
        workload.read_trace(path)


def test_azures_csv(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3,8\n"
    )
    first, second = workload.read_trace(path)
    assert second.at_s - first.at_s == pytest.approx(0.052)
    assert (first.num_prompt_tokens, second.num_output_tokens) == (4808, 8)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 4096))
def test_what_is_asked_fits_the_context(prompt: int, output: int, context: int) -> None:
    ask = workload.fitted(workload.Ask(0.0, prompt, output), context)
    assert 1 <= ask.num_prompt_tokens <= prompt
    assert 1 <= ask.num_output_tokens <= output
    assert ask.num_prompt_tokens + ask.num_output_tokens <= context
    assert ask.cut == (prompt + output > context)


@given(st.floats(0.5, 200))
def test_the_search_ends_near_the_highest_good_rate(highest: float) -> None:
    search = slo.RateSearch(4.0, max_trials=40)
    while not search.done:
        search.tell(search.rate <= highest)
    assert search.best is not None
    assert highest * 0.88 <= search.best <= highest


def test_conversations_give_questions_and_the_lengths_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "shared.json"
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Nobody"},
    ]
    asked = {"messages": [{"role": "user", "content": "Why so?"}, {"role": "assistant", "content": "Because."}]}
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, asked]))
    first, second = workload.read_conversations(path)
    assert (first.text, first.num_prompt_tokens, first.num_output_tokens) == ("Who?", 1, 2)
    assert (second.text, second.num_prompt_tokens, second.num_output_tokens) == ("Why so?", 2, 2)
    assert workload.Prompts(1000, 0).make(first, 0) == "Who?"
    path.write_text('{"conversations": []}')
    with pytest.raises(errors.InvalidRequestError, match="not like ShareGPT"):
        workload.read_conversations(path)


@given(st.integers(1, 300_000), st.integers(0, 2**31), st.integers(0, 2**31))
def test_prompts_share_nothing_by_chance(length: int, number: int, other: int) -> None:
    ask = workload.Ask(0.0, length, 1)
    prompt = PROMPTS.make(ask, number)
    assert len(prompt) == length
    assert prompt == PROMPTS.make(ask, number)
    if length >= 16 and number != other:
        assert prompt[:16] != PROMPTS.make(ask, other)[:16]


class RefusingDoor:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def target(self) -> Target:
        return Target("full", None, 1000)

    async def stream(
        self, prompt: workload.Prompt, num_output_tokens: int, timeout_s: float
    ) -> AsyncGenerator[int, None]:
        self.num_asked += 1
        raise errors.OverloadedError("full", retry_after_s=0.2)
        yield 1


async def test_a_closed_loop_that_is_refused_asks_again_after_a_pause() -> None:
    door = RefusingDoor()
    runner = Runner(door, max_open=3, closed=True, timeout_s=10)
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + 0.5
    asks = itertools.takewhile(lambda _: loop.time() < ends_s, itertools.repeat((0.0, ASK, lambda: [1])))
    outcome = await runner.run(asks)
    # Three places, each free again after at least 0.2 s, until the one that was free when the time was over.
    assert 3 <= door.num_asked == len(outcome.records) <= 12
    assert all(record.refused for record in outcome.records)


class StallingDoor:
    """Serves one at a time; the first takes ``stall_s``."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s

    async def target(self) -> Target:
        return Target("stalling", None, 1000)

    async def stream(
        self, prompt: workload.Prompt, num_output_tokens: int, timeout_s: float
    ) -> AsyncGenerator[int, None]:
        stall_s, self._stall_s = self._stall_s, 0.0
        await asyncio.sleep(stall_s)
        yield 1
        yield 1


async def test_a_stall_is_seen_by_all_who_were_due_meanwhile() -> None:
    """No coordinated omission: one stream at a time, so the others were sent only after the stall."""
    runner = Runner(StallingDoor(1.0), max_open=1, closed=False, timeout_s=10)
    outcome = await runner.run((number / 100, ASK, lambda: [1, 2, 3]) for number in range(50))
    assert len(outcome.records) == 50
    late = [record for record in outcome.records if record.ttft_s is not None and record.ttft_s >= 0.4]
    assert len(late) == 50
    summary = summarize(outcome.records, slo.Slo())
    assert summary.ttft is not None
    assert summary.ttft.p99 >= 0.9
    assert summary.max_open == 1


async def test_a_load_that_is_stopped_keeps_what_was_measured() -> None:
    def ended(_: Record) -> None:
        runner.stop()

    runner = Runner(StallingDoor(0.0), max_open=4, closed=True, timeout_s=10, on_end=ended)
    outcome = await runner.run((0.0, ASK, lambda: [1]) for _ in itertools.count())
    assert outcome.interrupted
    assert any(record.error is None for record in outcome.records)


def test_it_says_when_it_is_the_bottleneck() -> None:
    late = (Record(0.0, 0.5, 1.0, 3, (0.6, 0.7)),)
    summary = summarize(late, slo.Slo())
    assert bottleneck(Outcome(late, 0.1, 0.001, False), summary, 1) == []
    assert len(bottleneck(Outcome(late, 0.99, 0.2, False), summary, None)) == 3


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with FakeGateway(answer("Pa", "ris", "."), refuse(errors.OverloadedError("full")), answer("Pa", "ris")) as gateway:
        asked = ["bench", "--address", gateway.address, "--rate", "50", "--requests", "6", "--slo", "ttft=60s"]
        lengths_asked = ["--prompt-tokens", "2046", "--output-tokens", "3"]
        done = CliRunner().invoke(
            APP, [*asked, *lengths_asked, "--json", str(out), "--html", str(tmp_path / "out.html")]
        )
    assert done.exit_code == 0, done.output
    assert "5 of 6 answered" in done.stdout
    assert "failed: 1 OVERLOADED" in done.stdout
    assert "the first OVERLOADED: full" in done.stdout
    assert "6 requests were longer than the model's context" in done.stdout
    report = json.loads(out.read_text())
    assert (report["num_requests"], report["num_refused"]) == (6, 1)
    assert report["goodput_per_s"] == report["requests_per_s"] > 0
    html = (tmp_path / "out.html").read_text()
    assert html.count("<svg") == 5
    assert "5 of 6 requests answered" in html
    assert not re.search(r"(src|href)=|url\(|@import|<script", html)  # all that it needs is in it


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=1000))
def test_plots_are_xml_and_stay_within_their_frame(points: list[tuple[float, float]]) -> None:
    drawn = plot([Line("a & <b>", sorted(points))], "x", "y")
    [line] = ElementTree.fromstring(drawn).iter("polyline")
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert 1 <= len(places) <= MAX_POINTS + 1
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


@pytest.mark.parametrize("flags", [[], ["--rate", "1", "--find-rate"], ["--rate", "1", "--slo", "x"]])
def test_wrong_usage_is_one_sentence(flags: list[str]) -> None:
    done = CliRunner().invoke(APP, ["bench", *flags])
    assert done.exit_code == 1
    assert done.stderr.startswith("kvferry: ")
