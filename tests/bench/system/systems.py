"""Who does the work: the engine alone, a cluster of one worker, a cluster that splits."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, Role, clone_root, plan
from tests.bench.system import gaps, streams
from tests.bench.system.mix import Ask, num_tokens

ROOT = Path(__file__).resolve().parents[3]
KV_GIB = 1


class System(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, asks: list[Ask]) -> tuple[float, list[int]]:
        """Seconds for the whole mix, and the gaps between the steps of whoever decodes, by bucket."""


class Alone:
    def __init__(self, dtype: str, threads: int) -> None:
        command = [sys.executable, "-m", "tests.bench.system.alone", dtype, str(threads), str(KV_GIB << 30)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> Self:
        if self._line() != "ready":
            raise RuntimeError("the engine alone did not start; its words are above")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, asks: list[Ask]) -> tuple[float, list[int]]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([dataclasses.asdict(ask) for ask in asks]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._line())
        if answer is None or answer["tokens"] != num_tokens(asks):
            raise RuntimeError(f"the engine alone gave {answer} where {num_tokens(asks)} tokens were asked for")
        return answer["seconds"], answer["gaps"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith(("ready", '{"seconds"')):
                return line.strip()
        return "null"


class Through:
    """A cluster with a gateway, as ``kvferry serve`` starts it."""

    def __init__(self, name: str, dtype: str, threads: int, num_prefill: int) -> None:
        config = ClusterConfig(
            grpc_port=0, http_port=0, dtype=dtype, threads=threads, kv_memory=f"{KV_GIB}GiB", num_prefill=num_prefill
        )
        planned = plan(config, clone_root())
        self._address = planned.grpc_address
        self._metrics = next(m.metrics_url for m in planned.members if m.role is Role.DECODE)
        self._cluster = LocalCluster(planned.members, ROOT / "build/logs/bench-system" / name, restart=False)

    def __enter__(self) -> Self:
        self._cluster.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.stop()

    def run(self, asks: list[Ask]) -> tuple[float, list[int]]:
        assert self._metrics is not None
        before = gaps.scrape(self._metrics)
        seconds = asyncio.run(streams.run(self._address, asks))
        after = gaps.scrape(self._metrics)
        return seconds, [b - a for a, b in zip(before, after, strict=True)]
