"""Tells how a local cluster fares: a moving display on a terminal, plain lines when piped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvferry.cli import output
from kvferry.cli.cluster import Added, Died, Event, Leaving, Ready, Restarted, Stopped, describe_status


class StartProgress:
    """Shows which members are ready while the cluster starts; pass ``on_event`` to it.  Everything goes to stderr, so
    that an answer on stdout can be piped."""

    def __init__(self) -> None:
        self._console = output.console(stderr=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def show(self, names: list[str], doing: Callable[[str], str]) -> Self:
        """Names the members that will start; then enter.  ``doing``: asked now and then what one of them does."""
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓[/green]"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                _Doing(doing),
                console=self._console,
            )
            for name in names:
                self._tasks[name] = self._progress.add_task(name, total=1)
        else:
            output.say(f"starting {', '.join(names)}")
        return self

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, Ready) and self._progress is not None:
            self._progress.update(self._tasks[event.name], completed=1)
            return
        text = describe(event)
        if self._console.is_terminal:
            self._console.print(
                f"[bold yellow]{escape(text)}[/bold yellow]" if isinstance(event, Died) else escape(text)
            )
        else:
            output.say(text)


class _Doing(ProgressColumn):
    """What a member that is not ready yet does."""

    max_refresh = 0.5

    def __init__(self, doing: Callable[[str], str]) -> None:
        super().__init__()
        self._doing = doing

    def render(self, task: Task) -> Text:
        return Text("" if task.finished else self._doing(task.description), style="dim")


def describe(event: Event) -> str:
    match event:
        case Ready(name, pid, after_s):
            return f"{name} is ready after {after_s:.1f} s (pid {pid})"
        case Died(name, status, log_tail, restart_in_s):
            then = "it stays down" if restart_in_s is None else f"starting it again in {restart_in_s:.1f} s"
            return "\n".join([f"{name} {describe_status(status)}; {then}", *(f"  | {line}" for line in log_tail)])
        case Restarted(name, pid):
            return f"{name} was started again (pid {pid})"
        case Added(name):
            return f"{name} starts: one more worker"
        case Leaving(name):
            return f"{name} leaves as soon as it has finished what it has"
        case Stopped(name, status, killed):
            if killed:
                return f"{name} did not stop in time and was killed"
            return (
                f"{name} stopped" if status in (0, -signal.SIGTERM) else f"{name} stopped: it {describe_status(status)}"
            )
