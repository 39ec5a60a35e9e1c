"""Where a worker runs, as it is told on the command line."""

from __future__ import annotations

import pytest

from kvferry.api.directory.v1 import directory_pb2
from services.runtime.config import load
from services.runtime.protocol import SPOKEN
from services.worker.config import WorkerConfig
from services.worker.labels import MAX_LABELS, parse_labels
from tests.worker.tiny import make_worker
from transport import create
from transport.reach import Reach, Way


def test_labels_are_read() -> None:
    assert parse_labels(["zone=a", "example.com/rack=R-12", "zone=a"]) == {"zone": "a", "example.com/rack": "R-12"}
    config = load(WorkerConfig, ["--label", "zone=a", "--label", "rack=1"], "worker", {})
    assert config.label == ("zone=a", "rack=1")


@pytest.mark.parametrize("pair", ["zone", "=a", "zone=", "Zone=a", "zone=a b", "-zone=a", "zone=" + "a" * 129])
def test_what_is_no_label_is_refused(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="write one like zone=a"):
        parse_labels([pair])
    with pytest.raises(SystemExit):
        load(WorkerConfig, ["--label", pair], "worker", {})
    assert "--label: " in capsys.readouterr().err


def test_contradictions_and_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="zone is said to be a and b"):
        parse_labels(["zone=a", "zone=b"])
    with pytest.raises(ValueError, match="too many"):
        parse_labels([f"n{n}=x" for n in range(MAX_LABELS + 1)])


async def test_a_worker_registers_what_it_can_do() -> None:
    with create("loopback") as transport:
        worker = make_worker(transport, "p", 1)
        worker.paths, worker.labels = (Reach(Way.SHARED_MEMORY, "h"), Reach(Way.TCP)), {"zone": "a"}
        info = worker.info()
    assert (info.oldest_protocol, info.newest_protocol) == (SPOKEN.oldest, SPOKEN.newest)
    assert [(path.kind, path.scope) for path in info.paths] == [
        (directory_pb2.PATH_KIND_SHARED_MEMORY, "h"), (directory_pb2.PATH_KIND_TCP, ""),
    ]  # fmt: skip
    assert info.labels == {"zone": "a"}
