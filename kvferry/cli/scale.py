"""kvferry scale: more or fewer workers of a kvferry serve on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from kvferry import _supervisor
from kvferry.cli import options, output
from kvferry.cli.members import clone_root
from kvferry.types import WorkerRole


def scale(
    counts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[prefill=N] [decode=N]", help="How many there should be; nothing asks.", show_default=False
        ),
    ] = None,
    log_dir: options.LogDir = None,
) -> None:
    """Start or send off workers of a `kvferry serve` on this machine.

    Returns at once; `kvferry status --watch` shows them come and go. One that goes finishes what it has first: no request
    is lost. The one with least to finish goes. The supervisor is asked through a socket in the folder of its logs, which
    only its user may. With `kvferry serve --autoscale` the planner may change the numbers again.

    \b
    Examples:
      kvferry scale
      kvferry scale prefill=2 decode=1
    """
    wanted = dict(map(_parsed, counts or ()))
    with output.failures():
        found = _supervisor.ask(log_dir or clone_root() / "build" / "logs", wanted)
    output.say(", ".join(f"{count} {role.value}" for role, count in found.items()) + " workers")


def _parsed(text: str) -> tuple[WorkerRole, int]:
    role, _, count = text.partition("=")
    if role not in (WorkerRole.PREFILL.value, WorkerRole.DECODE.value) or not count.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither prefill=N nor decode=N")
    return WorkerRole(role), int(count)
