"""kvferry bench: put load on a gateway and tell what its clients would feel."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvferry.aio import AsyncClient
from kvferry.bench import arrivals, lengths, slo, workload
from kvferry.bench.record import Record
from kvferry.bench.runner import INTERRUPTED, GrpcDoor, Outcome, Runner
from kvferry.bench.statistics import Spread, Summary, summarize
from kvferry.bench.workload import Ask
from kvferry.cli import options, output
from kvferry.client import DEFAULT_ADDRESS
from kvferry.errors import InvalidRequestError
from kvferry.types import ModelInfo

MAX_OPEN = 10_000
BUSY_CORES, LATE_S = 0.9, 0.05

_LOAD, _SHAPE = "Load", "Requests"


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What one measurement sends.  Either ``rate`` or a trace's own times, or a closed loop of ``concurrency``."""

    rate: float | None
    burstiness: float
    concurrency: int | None
    trace: tuple[Ask, ...]
    speed: float
    prompt: lengths.Draw
    output: lengths.Draw
    seed: int
    warmup_s: float
    duration_s: float
    num_requests: int | None
    timeout_s: float

    @property
    def closed(self) -> bool:
        return self.rate is None and not self.trace

    def schedule(self, model: ModelInfo) -> Iterator[tuple[float, Ask, Callable[[], list[int]]]]:
        """In a closed loop everything may go at once; the runner's bound and clock hold it."""
        asks: Iterator[Ask] = iter(self.trace) if self.trace else workload.drawn(self.prompt, self.output, self.seed)
        times: Iterator[float]
        if self.rate is not None:
            times = arrivals.gamma(self.rate, self.burstiness, self.seed)
        elif self.trace:
            times = arrivals.scaled((ask.at_s for ask in self.trace), self.speed)
        else:
            times = itertools.repeat(0.0)
        prompts = workload.Prompts(model.vocab_size, self.seed)
        numbered = itertools.islice(zip(times, asks, strict=False), self.num_requests)
        for number, (at_s, asked) in enumerate(numbered):
            if at_s > self.warmup_s + self.duration_s:
                return
            ask = workload.fitted(asked, model.context_length)
            yield at_s, ask, partial(prompts.make, ask, number)


def bench(
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    model: options.ModelName = "",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, whatever comes back.", show_default=False, rich_help_panel=_LOAD),
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="1 is Poisson, more comes in bursts, less is more even.", rich_help_panel=_LOAD)
    ] = 1.0,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most streams at once; without a rate or trace, always so many.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Mooncake's .jsonl or Azure's .csv: its lengths and shared prefixes, and without --rate its times.",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    speed: Annotated[float, typer.Option(help="Times as fast as the trace.", rich_help_panel=_LOAD)] = 1.0,
    duration: Annotated[
        float, typer.Option(min=0.1, help="Seconds of sending, measured.", rich_help_panel=_LOAD)
    ] = 30.0,
    warmup: Annotated[
        float, typer.Option(min=0, help="Seconds of it before, not measured.", rich_help_panel=_LOAD)
    ] = 0.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Most requests.", show_default=False, rich_help_panel=_LOAD)
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help=f"{lengths.FORMS}.", rich_help_panel=_SHAPE)] = "256",
    output_tokens: Annotated[str, typer.Option(help="The same.", rich_help_panel=_SHAPE)] = "64",
    seed: Annotated[int, typer.Option(help="The same load for the same seed.", rich_help_panel=_SHAPE)] = 0,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds an answer may take.", rich_help_panel=_SHAPE)
    ] = 300.0,
    objectives: Annotated[
        str | None,
        typer.Option("--slo", help="What a good request keeps: ttft=500ms,itl=50ms,tpot=..,e2e=..", show_default=False),
    ] = None,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Search the highest rate that meets the SLO, from --rate.")
    ] = False,
    attain: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of good requests that will do.")] = 0.9,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there too.", show_default=False)
    ] = None,
) -> None:
    """Put load on a gateway and tell what its clients would feel.

    Latencies count from when a request was due, not from when it could be sent, so that a system that stalls cannot hide
    it. Answers are as long as asked (end-of-sequence is ignored). Ctrl-C ends the load, and what was measured is shown.

    \b
    Examples:
      kvferry bench --rate 2 --prompt-tokens lognormal:200:0.5 --slo ttft=500ms,itl=50ms
      kvferry bench --concurrency 8 --duration 60 --json out.json
      kvferry bench --trace mooncake.jsonl --speed 0.1
      kvferry bench --rate 1 --find-rate --slo ttft=1s --duration 20
    """
    with output.failures(address):
        if find_rate and (rate is None or objectives is None):
            raise InvalidRequestError("--find-rate needs --rate to start from and an --slo to meet")
        if rate is None and trace is None and concurrency is None:
            raise InvalidRequestError("say how much load: --rate, --concurrency or --trace")
        if speed != 1.0 and (trace is None or rate is not None):
            raise InvalidRequestError("--speed scales the times of a --trace; it goes without --rate")
        load = Load(
            rate=rate, burstiness=burstiness, concurrency=concurrency,
            trace=() if trace is None else tuple(workload.read_trace(trace)), speed=speed,
            prompt=lengths.parse(prompt_tokens), output=lengths.parse(output_tokens), seed=seed,
            warmup_s=warmup, duration_s=duration, num_requests=requests, timeout_s=timeout,
        )  # fmt: skip
        wanted = slo.Slo() if objectives is None else slo.parse(objectives)
        interrupted = asyncio.run(_run(address, api_key, model, load, wanted, attain if find_rate else None, json_file))
    if interrupted:
        raise typer.Exit(130)


async def _run(
    address: str, api_key: str | None, model_name: str, load: Load, wanted: slo.Slo, attain: float | None,
    json_file: Path | None,
) -> bool:  # fmt: skip
    """Whether it was interrupted.  ``attain``: search for the highest rate."""
    # Refusals are to be seen, not tried again.
    async with AsyncClient(address, api_key=api_key, max_attempts=1) as client:
        model = next((m for m in await client.models() if model_name in ("", m.name)), None)
        if model is None:
            raise InvalidRequestError(f"the gateway does not serve {model_name!r}")
        door = GrpcDoor(client, model_name)
        if attain is None:
            outcome = await _measure(door, load, model)
            summary = _show(outcome, load, wanted)
            report = _content(summary, outcome)
        else:
            assert load.rate is not None
            search, trials = slo.RateSearch(load.rate), []
            while not search.done:
                tried = dataclasses.replace(load, rate=search.rate)
                outcome = await _measure(door, tried, model)
                if outcome.interrupted:
                    break
                summary = _show(outcome, tried, wanted)
                trials.append({"rate": search.rate, **_content(summary, outcome)})
                search.tell(summary.num_requests > 0 and summary.attained >= attain)
            report = {"best_rate": search.best, "attain": attain, "trials": trials}
            found = "none of the rates tried" if search.best is None else f"{search.best:.3g} requests/s"
            print(f"highest rate tried that {attain:.0%} of requests meet the SLO at: {found}", flush=True)
    if json_file is not None:
        _write(json_file, report)
    return outcome.interrupted


def _write(json_file: Path, report: dict[str, Any]) -> None:
    try:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise InvalidRequestError(f"{json_file} cannot be written: {error.strerror}") from error


async def _measure(door: GrpcDoor, load: Load, model: ModelInfo) -> Outcome:
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=output.console(stderr=True), disable=not output.console(stderr=True).is_terminal,
    )  # fmt: skip
    task = progress.add_task("answers", total=load.num_requests)

    def ended(_: Record) -> None:
        progress.advance(task)

    bound = load.concurrency or MAX_OPEN
    runner = Runner(door, max_open=bound, closed=load.closed, timeout_s=load.timeout_s, on_end=ended)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, runner.stop)
    # A closed loop knows no times: what ends it is the clock, after which nothing more is taken from the schedule.
    schedule = load.schedule(model)
    if load.closed:
        ends_s = loop.time() + load.warmup_s + load.duration_s
        schedule = itertools.takewhile(lambda _: loop.time() < ends_s, schedule)
    try:
        with progress:
            return await runner.run(schedule)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _show(outcome: Outcome, load: Load, wanted: slo.Slo) -> Summary:
    measured = [r for r in outcome.records if r.scheduled_s >= load.warmup_s and r.error != INTERRUPTED]
    summary = summarize(measured, wanted)
    rows = [
        (name, *("" if value is None else f"{value * 1e3:.1f}" for value in _values(spread)))
        for name, spread in (
            ("time to first token", summary.ttft),
            ("time to second token", summary.second_token),
            ("between tokens (ITL)", summary.itl),
            ("per output token (TPOT)", summary.tpot),
            ("end to end", summary.e2e),
        )
    ]
    asked = "closed loop" if load.closed else ("trace" if load.rate is None else f"{load.rate:.3g} requests/s offered")
    output.show_table(
        f"{asked}: {summary.num_completed} of {summary.num_requests} answered, milliseconds",
        ("", "p50", "p90", "p99", "mean", "max"), rows, frozenset(range(1, 6)),
    )  # fmt: skip
    print(
        f"{summary.requests_per_s:.3g} requests/s, {summary.output_tokens_per_s:.4g} tokens/s, "
        f"at most {summary.max_open} streams open, in {summary.seconds:.1f} s"
    )
    if wanted != slo.Slo():
        print(f"goodput {summary.goodput_per_s:.3g} requests/s; {summary.attained:.1%} of requests met the SLO")
    if summary.errors:
        print("failed: " + ", ".join(f"{count} {reason}" for reason, count in sorted(summary.errors.items())))
    for line in bottleneck(outcome, summary, load.concurrency):
        output.say(line)
    return summary


def bottleneck(outcome: Outcome, summary: Summary, concurrency: int | None) -> list[str]:
    """Why the figures may be this process's own, rather than the system's."""
    found = []
    if outcome.cores >= BUSY_CORES:
        found.append(f"this process used {outcome.cores:.2f} cores")
    if outcome.loop_lag_s >= LATE_S:
        found.append(f"its event loop was up to {outcome.loop_lag_s * 1e3:.0f} ms late")
    # Sends that had to wait for --concurrency are late by the system's doing.
    lag = summary.send_lag
    if lag is not None and lag.p99 >= LATE_S and concurrency is None:
        found.append(f"1 % of sends were {lag.p99 * 1e3:.0f} ms late or more")
    return [f"kvferry bench may itself be the bottleneck: {reason}" for reason in found]


def _values(spread: Spread | None) -> tuple[float | None, ...]:
    return (None,) * 5 if spread is None else (spread.p50, spread.p90, spread.p99, spread.mean, spread.max)


def _content(summary: Summary, outcome: Outcome) -> dict[str, Any]:
    """Seconds."""
    return {**dataclasses.asdict(summary), "cores": outcome.cores, "loop_lag_s": outcome.loop_lag_s,
            "interrupted": outcome.interrupted}  # fmt: skip
