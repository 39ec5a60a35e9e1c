"""kvferry plan: whether to split, into how many of what, and what that saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from kvferry.bench import slo
from kvferry.bench.workload import write_trace
from kvferry.cli import child, options, output
from kvferry.cli.cluster import describe_status
from kvferry.cli.interrupts import Interrupts
from kvferry.cli.live import asks_of, attainment, hear_traffic
from kvferry.cli.members import ClusterError, clone_root
from kvferry.errors import InvalidRequestError

DEFAULT_SLO = "ttft=2s,itl=100ms"

_LOAD, _FLEET, _OUT = "Traffic", "Fleets", "Output"


def plan(
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="Mooncake's .jsonl (timestamp, input_length, output_length, hash_ids) or Azure's .csv (TIMESTAMP, "
            "ContextTokens, GeneratedTokens).",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A config.json, a folder with one, or llama-3.1-8b, llama-3.1-70b, qwen2.5-7b, qwen2.5-72b, deepseek-v3 "
            "or smollm2-135m; with --live by default the one that is served.",
            show_default=False,
        ),
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Plan for what this gateway serves, instead of a trace; of several gateways, with commas.",
            show_default=False,
        ),
    ] = None,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    objectives: Annotated[
        str, typer.Option("--slo", help="What a good request keeps: ttft=..,itl=..,tpot=..,e2e=..")
    ] = DEFAULT_SLO,
    hardware: Annotated[
        Path | None,
        typer.Option(
            help="Catalogue (TOML) of devices, prices and assumptions; services/planner/hardware.toml by default.",
            show_default=False,
            rich_help_panel=_FLEET,
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Devices and instances of it to plan with: h100,p5.48xlarge; all that are no instances by default.",
            show_default=False,
            rich_help_panel=_FLEET,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Weights: bf16, fp8 or int8; the model's own by default.", show_default=False,
                     rich_help_panel=_FLEET),
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(help="The gateways' --patience, by which short prompts go before long ones; by default the better of "
                     "4, theirs by default, and 0, the order of arrival.", show_default=False, rich_help_panel=_FLEET),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, Poisson, instead of the trace's own times.", show_default=False,
                     rich_help_panel=_LOAD),
    ] = None,
    speed: Annotated[float, typer.Option(help="Times as fast as the trace.", rich_help_panel=_LOAD)] = 1.0,
    requests: Annotated[
        int,
        typer.Option(min=1, help="Most requests to plan for: the busiest stretch. At a --rate as many, if need be the "
                     "trace's again and again.", rich_help_panel=_LOAD),
    ] = 5000,
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Arrival orders to try.", rich_help_panel=_LOAD)] = 3,
    sensitivity: Annotated[
        bool,
        typer.Option(help="Plan anew for slower links, longer prompts and more cache hits.", rich_help_panel=_OUT),
    ] = True,
    trace_out: Annotated[
        Path | None,
        typer.Option(help="With --live: write the traffic there, for later plans and kvferry bench --trace.",
                     show_default=False, rich_help_panel=_OUT),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots there.", show_default=False, rich_help_panel=_OUT)
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write all figures there.", show_default=False, rich_help_panel=_OUT),
    ] = None,
) -> None:  # fmt: skip
    """Say whether to split prefill and decode for your traffic, into how many of what, and what that saves.

    Fleets are simulated request by request, for each kind (colocated with chunked prefill, split on equal hardware, split
    on unequal hardware) the cheapest that keeps the objectives for 90 % and for 99 % of the requests is searched, and they
    are compared. The answer may be: do not split. Prices, peaks and how much of them is reached are assumptions: read
    the catalogue, and put in your own. Needs a clone of the repository.

    With --live the traffic is what a running gateway answered last (lengths and times, no text; with an API key, its
    tenant's), and what of the objectives it kept is said first.

    \b
    Examples:
      kvferry plan conversation.jsonl --model llama-3.1-70b --slo ttft=10s,itl=100ms --html plan.html
      kvferry plan code.csv --model llama-3.1-8b --slo ttft=1s,itl=50ms --speed 40 --devices h100,l40s,l4
      kvferry plan mine.csv --model ./config.json --hardware mine.toml --rate 12 --json plan.json
      kvferry plan --live gateway:8470 --model llama-3.1-8b --slo ttft=1s,itl=50ms
    """
    with output.failures(live), Interrupts() as interrupts, ExitStack() as stack:
        if not (0 < speed < float("inf")):
            raise InvalidRequestError(f"--speed must be above 0, not {speed}")
        if rate is not None and not (0 < rate < float("inf")):
            raise InvalidRequestError(f"--rate must be above 0, not {rate}")
        if patience is not None and not (0 <= patience < float("inf")):
            raise InvalidRequestError(f"--patience must be 0 or more, not {patience}")
        if rate is not None and speed != 1.0:
            raise InvalidRequestError("--speed scales the trace's own times; it goes without --rate")
        kept = slo.parse(objectives)
        if (trace is None) == (live is None):
            raise InvalidRequestError("name a trace, or a gateway with --live")
        if trace_out is not None and live is None:
            raise InvalidRequestError("--trace-out writes what --live hears")
        if live is not None:
            traffic = hear_traffic(live, api_key, options.client_tls(tls_ca))
            print(attainment(traffic, kept, objectives))
            written = write_trace(asks_of(traffic))
            if trace_out is not None:
                output.write_file(trace_out, written)
            trace = Path(stack.enter_context(TemporaryDirectory())) / f"live-{traffic.model.name.replace('/', '-')}.csv"
            trace.write_text(written)
            model = model or traffic.model.name
        assert trace is not None
        if model is None:
            raise InvalidRequestError("say with --model whose plan it is to be: llama-3.1-8b, or a config.json")
        # The planner runs in the clone, the user may be elsewhere.
        arguments = ["services.planner", str(trace.resolve()), "--slo", objectives, "--speed", str(speed)]
        arguments += ["--requests", str(requests), "--seeds", str(seeds)]
        arguments += ["--model", str(Path(model).resolve()) if Path(model).exists() else model]
        for flag, value in (("--devices", devices), ("--dtype", dtype), ("--rate", rate), ("--patience", patience)):
            arguments += [] if value is None else [flag, str(value)]
        for flag, path in (("--hardware", hardware), ("--html", html)):
            arguments += [] if path is None else [flag, str(path.resolve())]
        arguments += [] if sensitivity else ["--no-sensitivity"]
        document = _plan(clone_root("a plan", "make setup && .venv/bin/kvferry plan"), arguments)
        interrupts.check()
        if json_file is not None:
            output.write_file(json_file, document + "\n")
        show(json.loads(document))
        for path in filter(None, (html, json_file, trace_out)):
            output.say(f"wrote {path}")


def _plan(root: Path, arguments: Sequence[str]) -> str:
    """The report's JSON.  Raises InvalidRequestError with the planner's own words, or ClusterError."""
    wrong: list[str] = []
    with _progress() as tell:

        def hear(line: str) -> None:
            try:
                said = json.loads(line)
            except ValueError:
                return  # a warning or a traceback: the tail of what it said has it
            if "error" in said:
                wrong.append(said["error"])
            else:
                tell(said["done"], said["what"])

        ended = child.run(root, arguments, hear, timeout_s=None)
    if wrong:
        raise InvalidRequestError(wrong[-1])
    if ended.status or not ended.document:
        raise ClusterError(
            f"the planner {describe_status(ended.status)}; mend the installation with `make setup`", ended.said
        )
    return ended.document


@contextmanager
def _progress() -> Iterator[Callable[[float, str], None]]:
    """What to call with how much is done, 0 to 1, and what is tried; shown on a terminal."""
    console = output.console(stderr=True)
    with Progress(
        BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("reading", total=1.0)

        def tell(done: float, what: str) -> None:
            progress.update(task, completed=done, description=escape(what))

        yield tell


def show(report: Mapping[str, Any]) -> None:
    load = report["load"]
    planned, known = load["planned_requests"], load["num_requests"]
    print(
        f"{planned} requests {'of' if planned <= known else 'like'} the {known} of {load['trace']}: "
        f"{load['requests_per_s']:.3g}/s for {load['planned_s']:.0f} s, prompts of {load['mean_prompt_tokens']:.0f} tokens "
        f"({load['hit_rate']:.0%} cached), answers of {load['mean_answer_tokens']:.0f}; "
        f"{report['model']} in {report['dtype']}"
    )
    prefill_s, decode_s = (sum(window[key] for window in report["windows"]) for key in ("prefill_s", "decode_s"))
    if decode_s:
        print(f"prefill : decode = {prefill_s / decode_s:.2f} : 1 in seconds of one worker, over the whole trace")
        print(
            f"prefill's share from its begin to its end: {_sparkline([_prefill_share(w) for w in report['windows']])}"
        )
    if (roof := report["roofline"]) is not None:
        steps = "; ".join(f"{name} {intensity:.3g}" for name, intensity in roof["points"])
        bend = roof["flops_per_s"] / roof["bytes_per_s"]
        print(f"FLOP/byte on {roof['worker']}, where memory bounds what has less than {bend:.3g}: {steps}")
    if load["num_cells"] > 1:
        print(f"planned as {load['num_cells']} equal fleets, to which requests go in turn")
    for share in sorted({outcome["share"] for outcome in report["outcomes"]}):
        rows = [_row(outcome) for outcome in report["outcomes"] if outcome["share"] == share]
        output.show_table(
            f"\nCheapest that keeps {_objectives(report['slo'])} for {share:.0%} of the requests", _HEADINGS, rows,
            frozenset(range(2, len(_HEADINGS))),
        )  # fmt: skip
    if len(report["sensitivity"]) > 1:
        kinds = tuple(report["sensitivity"][0]["usd_per_hour"])
        output.show_table(
            "\nIf it were otherwise, $/hour", ("", *kinds, "splitting saves"),
            [
                (row["what"], *("none found" if usd is None else f"{usd:.2f}" for usd in row["usd_per_hour"].values()),
                 "" if row["split_saves"] is None else f"{row['split_saves']:.0%}")
                for row in report["sensitivity"]
            ],
            frozenset(range(1, 2 + len(kinds))),
        )  # fmt: skip
    verdict = report["verdict"]
    print(f"\n{verdict['headline']}")
    for text in filter(None, (verdict["reason"], verdict["price"])):
        print(text)
    print(f"For {max(outcome['share'] for outcome in report['outcomes']):.0%}: {report['strict_verdict']['headline']}")
    print(
        f"{report['num_seeds']} arrival orders, {report['num_simulated']} fleets simulated from a catalogue dated "
        f"{dict(report['assumptions'])['catalogue dated']}; nothing was measured on this hardware.",
        flush=True,
    )


def _prefill_share(window: Mapping[str, float]) -> float | None:
    """None where nothing was asked."""
    total_s = window["prefill_s"] + window["decode_s"]
    return window["prefill_s"] / total_s if total_s else None


def _sparkline(shares: Sequence[float | None]) -> str:
    """A character for each: eighths, a blank for None."""
    eighths = "▁▂▃▄▅▆▇█"
    return "".join(" " if share is None else eighths[min(7, int(8 * share))] for share in shares)


_HEADINGS = (
    "fleet", "workers", "patience", "$/hour", "$/M tokens", "TTFT p50", "p99 s", "2nd p50", "ITL p50", "p99 ms", "busy",
    "good/s/dev", "good/$",
)  # fmt: skip


def _row(outcome: Mapping[str, Any]) -> tuple[str, ...]:
    option = outcome["option"]
    if option is None:
        return (outcome["kind"], "none found", *("" for _ in _HEADINGS[2:]))
    decode = f"{option['num_decode']} x {option['decode']}"
    workers = f"{decode}, chunks of {option['mixed_tokens']}"
    busy = f"{option['decode_busy']['mean']:.0%}"
    if option["prefill"] is not None:
        workers = f"{option['num_prefill']} x {option['prefill']} : {decode}"
        busy = f"{option['prefill_busy']['mean']:.0%} : {busy}"
    workers += "".join(f"; {count} {name}" for name, count in option["instances"].items())
    first, second, itl = option["first_token"], option["second_token"], option["itl"]
    return (
        outcome["kind"], workers, f"{option['patience']:g}", f"{option['usd_per_hour']:.2f}",
        _interval(option["usd_per_mtok"]),
        f"{first['p50']['mean']:.3g}", f"{first['p99']['mean']:.3g}", f"{second['p50']['mean']:.3g}",
        f"{itl['p50']['mean'] * 1e3:.3g}", f"{itl['p99']['mean'] * 1e3:.3g}", busy,
        f"{option['goodput_per_device']['mean']:.3g}", _count(option["goodput_per_usd"]["mean"]),
    )  # fmt: skip


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3g}" + (f" ± {value['half']:.1g}" if value["half"] else "")


def _objectives(bounds: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:g} s" for key, value in bounds.items())
