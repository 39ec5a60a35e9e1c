"""kvferry bench: put load on a gateway and tell what its clients would feel."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvferry.aio import AsyncClient
from kvferry.bench import lengths, slo, workload
from kvferry.bench.doors import Door, GrpcDoor, Target
from kvferry.bench.load import Load
from kvferry.bench.record import Record
from kvferry.bench.runner import Outcome, Runner
from kvferry.bench.statistics import Summary
from kvferry.cli import figures, options, output
from kvferry.client import DEFAULT_ADDRESS
from kvferry.errors import InvalidRequestError

MAX_OPEN = 10_000

_LOAD, _SHAPE = "Load", "Requests"


def bench(
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    http: Annotated[
        str | None,
        typer.Option(
            help="Any OpenAI API instead, such as http://127.0.0.1:8471/v1, by its completions.",
            show_default=False,
            rich_help_panel="Gateway",
        ),
    ] = None,
    model: options.ModelName = "",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, whatever comes back.", show_default=False, rich_help_panel=_LOAD),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            min=0, help="1 is Poisson, more comes in bursts, less is more even, 0 is even.", rich_help_panel=_LOAD
        ),
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
    conversations: Annotated[
        Path | None,
        typer.Option(
            help="A ShareGPT-like .json: first questions, and answers as long, by 4 characters a token.",
            show_default=False,
            rich_help_panel=_SHAPE,
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
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots there.", show_default=False)
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
      kvferry bench --http http://127.0.0.1:8471/v1 --concurrency 8
      kvferry bench --rate 1 --find-rate --slo ttft=1s --duration 20
    """
    with output.failures(address if http is None else http):
        if find_rate and (rate is None or objectives is None):
            raise InvalidRequestError("--find-rate needs --rate to start from and an --slo to meet")
        if rate is None and trace is None and concurrency is None:
            raise InvalidRequestError("say how much load: --rate, --concurrency or --trace")
        if trace is not None and conversations is not None:
            raise InvalidRequestError("--trace and --conversations both say what is asked; give one of them")
        if speed != 1.0 and (trace is None or rate is not None):
            raise InvalidRequestError("--speed scales the times of a --trace; it goes without --rate")
        load = Load(
            rate=rate, burstiness=burstiness, concurrency=concurrency,
            trace=() if trace is None else tuple(workload.read_trace(trace)), speed=speed,
            conversations=() if conversations is None else tuple(workload.read_conversations(conversations)),
            prompt=lengths.parse(prompt_tokens), output=lengths.parse(output_tokens), seed=seed,
            warmup_s=warmup, duration_s=duration, num_requests=requests, timeout_s=timeout,
        )  # fmt: skip
        wanted = slo.Slo() if objectives is None else slo.parse(objectives)
        way_in = _WayIn(address, http, api_key, tls_ca, model)
        interrupted = asyncio.run(_run(way_in, load, wanted, attain if find_rate else None, json_file, html_file))
    if interrupted:
        raise typer.Exit(130)


@dataclasses.dataclass(frozen=True, slots=True)
class _WayIn:
    """``http``: the URL to put load on instead of ``address``."""

    address: str
    http: str | None
    api_key: str | None
    tls_ca: Path | None
    model: str

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Door]:
        if self.http is not None:
            try:
                from kvferry.bench.http_door import open_http_door
            except ModuleNotFoundError as error:
                raise InvalidRequestError("--http needs aiohttp: pip install 'kvferry[load]'") from error
            async with open_http_door(self.http, self.api_key, self.tls_ca, self.model, MAX_OPEN) as door:
                yield door
            return
        tls = options.client_tls(self.tls_ca)
        # Refusals are to be seen, not tried again.
        async with AsyncClient(self.address, api_key=self.api_key, tls=tls, max_attempts=1) as client:
            yield GrpcDoor(client, self.model)


async def _run(
    way_in: _WayIn, load: Load, wanted: slo.Slo, attain: float | None, json_file: Path | None, html_file: Path | None
) -> bool:
    """Whether it was interrupted.  ``attain``: search for the highest rate."""
    html: str | None
    async with way_in.open() as door:
        target = await door.target()
        if attain is None:
            outcome = await _measure(door, load, target)
            summary = figures.summary_of(outcome, load, wanted)
            figures.show(outcome, summary, load, wanted)
            report = figures.content(summary, outcome, load)
            html = figures.html(outcome, summary, load, wanted)
        else:
            assert load.rate is not None
            search, trials = slo.RateSearch(load.rate), []
            shown: tuple[Outcome, Summary, Load] | None = None
            rates: list[tuple[float, Summary]] = []
            while not search.done:
                tried = dataclasses.replace(load, rate=search.rate)
                outcome = await _measure(door, tried, target)
                if outcome.interrupted:
                    break
                summary = figures.summary_of(outcome, tried, wanted)
                figures.show(outcome, summary, tried, wanted)
                rates.append((search.rate, summary))
                is_good = summary.num_requests > 0 and summary.attained >= attain
                if is_good or search.best is None:  # the highest good rate, else the last
                    shown = outcome, summary, tried
                trials.append({"rate": search.rate, **figures.content(summary, outcome, tried)})
                search.tell(is_good)
            html = None if shown is None else figures.html(*shown, wanted, rates)
            report = {"best_rate": search.best, "attain": attain, "trials": trials}
            found = "none of the rates tried" if search.best is None else f"{search.best:.3g} requests/s"
            print(f"highest rate tried that {attain:.0%} of requests meet the SLO at: {found}", flush=True)
    if json_file is not None:
        output.write_file(json_file, json.dumps(report, indent=1) + "\n")
    if html_file is not None and html is not None:
        output.write_file(html_file, html)
    return outcome.interrupted


async def _measure(door: Door, load: Load, target: Target) -> Outcome:
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
    schedule = load.schedule(target.vocab_size, target.context_length)
    if load.closed:
        ends_s = loop.time() + load.warmup_s + load.duration_s
        schedule = itertools.takewhile(lambda _: loop.time() < ends_s, schedule)
    try:
        with progress:
            return await runner.run(schedule)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
