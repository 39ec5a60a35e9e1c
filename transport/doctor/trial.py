"""Two processes of this host that reach for each other and move blocks: what really happens, and how fast."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transport import base
from transport.base import Op
from transport.doctor.facts import Rate, Trial
from transport.ucp import SETTINGS, may_map

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0
BLOCK_NBYTES = 64 << 10
PROBE_BLOCKS = 64  # 4 MiB: enough for huge pages
TRIAL_BLOCKS = 2048


@dataclass(frozen=True, slots=True)
class Work:
    """How large each process's pool is, half of which a round moves, and how long to go on with each operation.
    Without ``seconds`` nothing is moved."""

    num_blocks: int = PROBE_BLOCKS
    seconds: float = 0.0


def work_for(available_nbytes: int) -> Work:
    """To measure with: three such pools exist at a time, and take an eighth of the memory at most."""
    fitting = available_nbytes // 8 // 3 // BLOCK_NBYTES
    return Work(max(PROBE_BLOCKS, min(TRIAL_BLOCKS, fitting)), seconds=1.0)


def try_out(title: str, settings: Mapping[str, str], work: Work, tell: Callable[[str], None]) -> Trial:
    """With ``settings`` on top of this process's environment.  Blocks, for TIMEOUT_S at most, and leaves nothing behind."""
    environment = {**os.environ, **settings}
    ucx_tls = environment.get("UCX_TLS", SETTINGS["UCX_TLS"])
    expected = base.Path.MAPPED if may_map(ucx_tls) else base.Path.RMA
    trial = Trial(title, ucx_tls, expected)
    try:
        tell(f"{title}: starting two processes")
        with _Pair(environment, work.num_blocks) as pair:
            trial = replace(trial, ucx_version=pair.target.ask("tell_version"))
            there = pair.target.ask("allocate")
            trial = replace(trial, huge_pages=there["huge_pages"])
            pair.initiator.ask("allocate")
            opened = pair.initiator.ask("open", descriptor=there["descriptor"])
            path = base.Path(opened["path"])
            trial = replace(trial, path=path, why_not_mapped=opened["why_not_mapped"])
            for op in Op if work.seconds else ():
                tell(f"{trial.label}: measuring {op}s")
                trial = replace(trial, rates=(*trial.rates, _rate(pair, op, work)))
    except _Failed as e:
        return replace(trial, failure=str(e))
    return trial


def _rate(pair: _Pair, op: Op, work: Work) -> Rate:
    first_salt = 0 if op is Op.WRITE else 2
    pair.target.ask("fill", salt=first_salt)
    pair.initiator.ask("fill", salt=first_salt + 1)
    taken = pair.initiator.ask("run", op=op, seconds=work.seconds)
    copying, moving = taken["copying"], taken["moving"]
    nbytes = work.num_blocks // 2 * BLOCK_NBYTES
    return Rate(
        op=op,
        gb_per_s=nbytes / statistics.median(moving) / 1e9,
        memcpy_gb_per_s=nbytes / statistics.median(copying) / 1e9,
        of_memcpy=statistics.median(copy / move for copy, move in zip(copying, moving, strict=True)),
        num_rounds=len(moving),
        intact=pair.initiator.ask("digest", side="local") == pair.target.ask("digest", side="remote"),
    )


class _Failed(Exception):
    """Why a trial came to no end."""


class _Pair:
    """Both processes, for TIMEOUT_S at most."""

    def __init__(self, environment: Mapping[str, str], num_blocks: int) -> None:
        self._environment, self._num_blocks = environment, num_blocks

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.target, self.initiator = (
                stack.enter_context(_Process(self._environment, self._num_blocks)) for _ in range(2)
            )
            timer = threading.Timer(TIMEOUT_S, self._expire)
            timer.start()
            stack.callback(timer.cancel)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _expire(self) -> None:
        for process in (self.target, self.initiator):
            process.expire()


class _Process:
    """A neighbour.  It ends with its standard input, should this process be killed."""

    def __init__(self, environment: Mapping[str, str], num_blocks: int) -> None:
        self._expired = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "transport.doctor.neighbour", str(num_blocks), str(BLOCK_NBYTES)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> Any:
        """Raises _Failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = self._process.stdout.readline()  # what it said before it ended
        if not line:
            status = self._process.wait()
            what = f"did not {do} within {TIMEOUT_S:g} s" if self._expired else f"ended with status {status}"
            raise _Failed(f"a process of the trial {what}")
        reply = json.loads(line)
        if "error" in reply:
            raise _Failed(reply["error"])
        return reply["answer"]

    def expire(self) -> None:
        self._expired = True
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
