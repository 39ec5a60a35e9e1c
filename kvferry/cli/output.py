"""How things are shown: rich on a terminal, plain lines when piped; results on stdout, all else on stderr."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kvferry
from kvferry.cli.members import ClusterError
from kvferry.cli.ports import PortError
from kvferry.errors import InvalidRequestError


def console(*, stderr: bool = False) -> Console:
    """Made anew each time: tests and shells exchange the standard streams."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def is_terminal() -> bool:
    return sys.stdout.isatty()


def say(text: str) -> None:
    """A line of progress or explanation, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def failures(address: str | None = None) -> Iterator[None]:
    """Turns what can go wrong into one sentence on stderr and exit code 1; Ctrl-C into 130."""
    try:
        yield
    except kvferry.Error as error:
        fail(sentence(error, address))
    except ClusterError as error:
        fail(str(error), error.log_tail)
    except PortError as error:
        fail(str(error))
    except BrokenPipeError:
        # Whoever read has gone; what the interpreter flushes at exit must not complain about that again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None


def fail(message: str, log_tail: tuple[str, ...] = ()) -> None:
    errors = console(stderr=True)
    for line in log_tail:
        errors.print(
            f"[dim]  | {escape(line)}[/dim]" if errors.is_terminal else f"  | {line}", markup=errors.is_terminal
        )
    if errors.is_terminal:
        errors.print(f"[bold red]kvferry:[/bold red] {escape(message)}")
    else:
        say(f"kvferry: {message}")
    raise typer.Exit(1)


def sentence(error: kvferry.Error, address: str | None) -> str:
    """What the user can do about it, where gRPC's own words would not say."""
    if isinstance(error, kvferry.UnavailableError) and error.message.startswith("failed to connect"):
        return (
            f"no gateway answers at {address}; start a cluster with `kvferry serve`, or name another gateway with "
            "--address, or the authority of its certificate with --tls-ca"
        )
    if isinstance(error, kvferry.UnavailableError) and "errors resolving" in error.message:
        return f"{address} is no address that can be found; write host:port, such as 127.0.0.1:8470, without http://"
    if isinstance(error, kvferry.DeadlineError):
        return f"the gateway at {address} did not finish within the time allowed; allow more with --timeout"
    hint = "" if error.retry_after_s is None else f" (try again in {error.retry_after_s:.3g} s)"
    return f"{error.message}{hint}"


def print_json(value: Any) -> None:
    """One JSON document on stdout, of dataclasses, enums and plain values."""

    def plain(item: Any) -> Any:
        if isinstance(item, enum.Enum):
            return item.value
        raise TypeError(f"{type(item).__name__} has no JSON form")

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    print(json.dumps(value, default=plain, ensure_ascii=False), flush=True)


def table(title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], numeric: frozenset[int]) -> Table:
    """For a terminal; ``numeric`` columns are aligned right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, heading in enumerate(headings):
        is_number = index in numeric
        made.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def aligned(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], numeric: frozenset[int]) -> str:
    """The same in plain text, two spaces between columns."""
    lines = [headings, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in numeric else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def show_table(
    title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], numeric: frozenset[int] = frozenset()
) -> None:
    if is_terminal():
        Console(highlight=False).print(table(title, headings, rows, numeric))
    else:
        print(title)
        print(aligned(headings, rows, numeric), flush=True)


def write_file(path: Path, text: str) -> None:
    """Raises InvalidRequestError where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}") from error
