"""kvferry calibrate: how long the engine's steps take, here or on workers that serve, for kvferry plan."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvferry.cli import child, options, output
from kvferry.cli.cluster import describe_status
from kvferry.cli.interrupts import Interrupts
from kvferry.cli.members import DEFAULT_MODEL, ClusterError, clone_root
from kvferry.cli.step_sums import between, sums_of, workers_of
from kvferry.client import Client
from kvferry.errors import InvalidRequestError
from kvferry.types import TlsConfig

TIMEOUT_S = 1800.0
_LIVE = "Of a running cluster"
POOR_FIT = 0.15  # median error, from which a warning goes with the costs


def calibrate(
    model: Annotated[
        str, typer.Option(help="A .gguf file, a Hugging Face directory or id, or the default's name.")
    ] = DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option(help="As workers are given it; auto is what they choose.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute, as workers will have them.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Times each step is measured; the medians are fitted.")] = 5,
    live: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of the workers behind this gateway, by what they compute for its clients meanwhile.",
            show_default=False,
            rich_help_panel=_LIVE,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long to watch; 0: since each worker's start.", rich_help_panel=_LIVE)
    ] = 60.0,
    workers: Annotated[
        str | None,
        typer.Option(
            help="These alone, with commas: workers on unequal machines want costs of their own.",
            show_default=False,
            rich_help_panel=_LIVE,
        ),
    ] = None,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the costs there.", show_default=False)] = None,
) -> None:
    """Measure steps of the real engine, and fit the costs that predict their time.

    On this machine: prompts in chunks, batches that decode, and both at once, on CPU. Run it while nothing else runs. What
    moving blocks costs is a default, not measured. Needs a clone of the repository.

    With --live nothing is started or stopped: the workers of a running cluster, on any device, tell what their steps held
    and took, and what their transfers took. Both phases must have worked in that time.

    \b
    Examples:
      kvferry calibrate --json costs.json
      kvferry calibrate --model ./model.gguf --dtype bfloat16 --threads 4
      kvferry calibrate --live gateway:8470 --seconds 300 --json costs.json
    """
    with output.failures(live), Interrupts() as interrupts, TemporaryDirectory() as folder:
        root = clone_root("calibration", "make setup && .venv/bin/kvferry calibrate")
        arguments = ["services.planner.calibrate", "--model", model, "--dtype", dtype, "--threads", str(threads),
                     "--rounds", str(rounds)]  # fmt: skip
        if live is not None:
            heard = _hear(live, api_key, options.client_tls(tls_ca), seconds, workers.split(",") if workers else [])
            file = Path(folder) / "sums.json"
            file.write_text(json.dumps(heard))
            arguments += ["--sums", str(file)]
        with _progress() as tell:
            ended = child.run(root, arguments, tell, timeout_s=TIMEOUT_S)
        interrupts.check()
        if not ended.document:
            raise ClusterError(f"the calibration {describe_status(ended.status)}", ended.said)
        found = json.loads(ended.document)
        _show(found)
        if json_file is not None:
            output.write_file(json_file, json.dumps(found, indent=1) + "\n")


def _hear(
    address: str, api_key: str | None, tls: TlsConfig | None, seconds: float, named: Sequence[str]
) -> dict[str, Any]:
    """What the workers tell, for the child.  Raises kvferry.Error."""
    with Client(address, api_key=api_key, tls=tls) as client:
        cluster = client.cluster()
        before = sums_of(workers_of(cluster, named)) if seconds else {}
        _watch(seconds)
        cluster = client.cluster()
        workers = workers_of(cluster, named)
    sums = between(before, sums_of(workers))
    when = f"in {seconds:g} s" if seconds else "since it started"
    if sums is None:
        raise InvalidRequestError(f"no worker computed anything {when}; send requests meanwhile, as with kvferry bench")
    if not sums.shares[1] or not sums.shares[3]:
        lacking = "no prompt was computed" if not sums.shares[1] else "nothing was decoded"
        raise InvalidRequestError(f"{lacking} {when}, so it has no price; watch for longer")
    layout = workers[0].layout
    writers = [w for w in workers if w.transfer_bytes_per_s]
    return {
        "sums": asdict(sums),
        "block_nbytes": layout.block_nbytes, "block_size": layout.block_size_tokens,
        "model": cluster.model.name, "dtype": f"KV in {layout.dtype}",
        "transfer_bytes_per_s": _mean([w.transfer_bytes_per_s for w in writers]),
        "round_trip_s": _mean([w.transfer_round_trip_s for w in writers]),
    }  # fmt: skip


def _watch(seconds: float) -> None:
    console = output.console(stderr=True)
    began_s = time.monotonic()
    with Progress(
        TextColumn("watching the workers"), BarColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=seconds)
        while (passed_s := time.monotonic() - began_s) < seconds:
            progress.update(task, completed=passed_s)
            time.sleep(min(0.2, seconds - passed_s))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _show(found: dict[str, Any]) -> None:
    costs = found["costs"]
    by_default = "" if found.get("transfer_measured") else " (default)"
    rows = [
        ("each step", f"{costs['step_s'] * 1e3:.3f} ms"),
        ("each prompt token", f"{costs['prefill_token_s'] * 1e6:.1f} µs"),
        ("each pair that it attends to", f"{costs['attention_pair_s'] * 1e9:.2f} ns"),
        ("each sequence that decodes", f"{costs['decode_sequence_s'] * 1e6:.1f} µs"),
        ("each token of its context", f"{costs['decode_context_token_s'] * 1e9:.1f} ns"),
        (f"a message there and back{by_default}", f"{costs['round_trip_s'] * 1e3:.3g} ms"),
        (f"transfer{by_default}", f"{costs['transfer_bytes_per_s'] / 1e9:.3g} GB/s"),
    ]
    whose = ", ".join(
        [found["model"], found["dtype"], *([f"{found['threads']} thread(s)"] if "threads" in found else [])]
    )
    output.show_table(whose, ("", ""), rows, frozenset({1}))
    if "rms_error" in found:
        print(
            f"{found['steps']} steps of clients' requests; error {found['rms_error']:.1%} of what was expected (rms)",
            flush=True,
        )
        return
    print(
        f"of {found['steps']} measured steps the median is predicted within {found['median_error']:.1%}, "
        f"the worst within {found['max_error']:.1%}",
        flush=True,
    )
    if found["median_error"] > POOR_FIT:
        output.say(
            "the fit is poor: something else may have used the machine meanwhile; measure again when it is quiet"
        )


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What to call with each line that the child says."""
    console = output.console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("starting", total=None)

        def tell(line: str) -> None:
            try:
                step = json.loads(line)
            except ValueError:
                return  # the last words of a failure, which the caller has too
            progress.update(task, description=step["what"], completed=step["done"], total=step["total"])

        yield tell
