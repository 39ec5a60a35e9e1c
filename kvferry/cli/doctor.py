"""kvferry doctor: what this host gives the transport, and what to change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvferry.cli import child, options, output
from kvferry.cli.cluster import describe_status
from kvferry.cli.interrupts import Interrupts
from kvferry.cli.members import ClusterError, clone_root

TIMEOUT_S = 240.0
MARKS = {"ok": ("✓", "green"), "note": ("·", "dim"), "warning": ("!", "bold yellow"), "broken": ("✗", "bold red")}
CHANGES = "What to change"


def doctor(
    measure: Annotated[bool, typer.Option(help="Measure how fast blocks move, for some seconds.")] = True,
    as_json: options.Json = False,
) -> None:
    """Look at this host: UCX, memory, and which way KV blocks will take, how fast, next to memcpy.

    Two processes map and reach each other, and move scattered blocks of 64 KiB. The last section says what to change.
    Ends with 1 when something is broken. Needs a clone of the repository, or a container of a worker's image, where
    it is `python -m kvferry.cli doctor`.

    \b
    Examples:
      kvferry doctor
      kvferry doctor --no-measure
      kvferry doctor --json | jq '.findings[] | select(.level != "ok")'
    """
    with output.failures(), Interrupts() as interrupts:
        root = clone_root("the doctor", "make setup && .venv/bin/kvferry doctor", ("transport",))
        document = _examine(root, measure)
        interrupts.check()
        report = json.loads(document)
        if as_json:
            print(document, flush=True)
        else:
            show(report["findings"])
    if report["broken"]:
        raise typer.Exit(1)


def _examine(root: Path, measure: bool) -> str:
    """The report's JSON.  Raises ClusterError; leaves no process behind."""
    arguments = ("transport.doctor", "--json", *(() if measure else ("--no-measure",)))
    with _progress() as tell:
        ended = child.run(root, arguments, tell, timeout_s=TIMEOUT_S)
    if not ended.document:
        raise ClusterError(
            f"the examination {describe_status(ended.status)}; mend the installation with `make setup`", ended.said
        )
    return ended.document


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What to call with what is going on: a spinner on a terminal, lines when piped, on stderr."""
    console = output.console(stderr=True)
    if not console.is_terminal:
        yield output.say
        return
    with console.status("starting") as status:
        yield lambda what: status.update(escape(what))


def show(findings: list[dict[str, Any]]) -> None:
    """A section each, then what to change."""
    changes = [finding["change"] for finding in findings if finding["change"]]
    sections = [
        (name, [(*MARKS[finding["level"]], finding["text"]) for finding in group])
        for name, group in groupby(findings, key=lambda finding: finding["section"])
    ]
    rows = [("→", "bold", change) for change in changes] or [("✓", "green", "nothing")]
    for name, lines in (*sections, (CHANGES, rows)):
        if output.is_terminal():
            console = Console(highlight=False)
            console.print(name, style="bold")
            console.print(_grid(lines))
        else:
            print(name, *(f"  {mark} {text}" for mark, _, text in lines), sep="\n", flush=True)


def _grid(lines: list[tuple[str, str, str]]) -> Table:
    """Long texts go on below their own beginning."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=3, justify="right")
    grid.add_column(overflow="fold")
    for mark, style, text in lines:
        grid.add_row(f"[{style}]{mark}[/{style}]", escape(text))
    return grid
