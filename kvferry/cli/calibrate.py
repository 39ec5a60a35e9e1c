"""kvferry calibrate: how long the engine's steps take on this machine, for kvferry plan and the simulator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvferry.cli import child, output
from kvferry.cli.cluster import describe_status
from kvferry.cli.interrupts import Interrupts
from kvferry.cli.members import DEFAULT_MODEL, ClusterError, clone_root

TIMEOUT_S = 1800.0
POOR_FIT = 0.15  # median error, from which a warning goes with the costs


def calibrate(
    model: Annotated[
        str, typer.Option(help="A .gguf file, a Hugging Face directory or id, or the default's name.")
    ] = DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option(help="As workers are given it; auto is what they choose.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute, as workers will have them.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Times each step is measured; the medians are fitted.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the costs there.", show_default=False)] = None,
) -> None:
    """Measure steps of the real engine on this machine, and fit the costs that predict their time.

    Prompts in chunks, batches that decode, and both at once, on CPU. Run it while nothing else runs. What moving blocks
    costs is a default, not measured. Needs a clone of the repository.

    \b
    Examples:
      kvferry calibrate --json costs.json
      kvferry calibrate --model ./model.gguf --dtype bfloat16 --threads 4
    """
    with output.failures(), Interrupts() as interrupts:
        root = clone_root("calibration", "make setup && .venv/bin/kvferry calibrate")
        arguments = ("services.planner.calibrate", "--model", model, "--dtype", dtype, "--threads", str(threads),
                     "--rounds", str(rounds))  # fmt: skip
        with _progress() as tell:
            ended = child.run(root, arguments, tell, timeout_s=TIMEOUT_S)
        interrupts.check()
        if not ended.document:
            raise ClusterError(f"the calibration {describe_status(ended.status)}", ended.said)
        found = json.loads(ended.document)
        _show(found)
        if json_file is not None:
            output.write_file(json_file, json.dumps(found, indent=1) + "\n")


def _show(found: dict[str, Any]) -> None:
    costs = found["costs"]
    rows = [
        ("each step", f"{costs['step_s'] * 1e3:.3f} ms"),
        ("each prompt token", f"{costs['prefill_token_s'] * 1e6:.1f} µs"),
        ("each pair that it attends to", f"{costs['attention_pair_s'] * 1e9:.2f} ns"),
        ("each sequence that decodes", f"{costs['decode_sequence_s'] * 1e6:.1f} µs"),
        ("each token of its context", f"{costs['decode_context_token_s'] * 1e9:.1f} ns"),
        ("a message there and back (default)", f"{costs['round_trip_s'] * 1e3:.3g} ms"),
        ("transfer (default)", f"{costs['transfer_bytes_per_s'] / 1e9:.3g} GB/s"),
    ]
    output.show_table(
        f"{found['model']}, {found['dtype']}, {found['threads']} thread(s)", ("", ""), rows, frozenset({1})
    )
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
