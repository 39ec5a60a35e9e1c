"""Which transfers are verified, and what an operator may write for it."""

from __future__ import annotations

import random

import pytest

from services.runtime.config import load
from services.worker.config import WorkerConfig
from services.worker.share import Share


@pytest.mark.parametrize(
    ("text", "expected"), [("all", 1.0), ("none", 0.0), ("1/16", 1 / 16), ("3/4", 0.75), ("1/1", 1.0)]
)
def test_the_share_that_was_asked_for_is_taken(text: str, expected: float) -> None:
    share, drawn = Share.parse(text), random.Random(7)
    taken = sum(share.takes(drawn.random()) for _ in range(10_000)) / 10_000
    assert taken == pytest.approx(expected, abs=0.01)
    assert share.takes(0.0) == (expected > 0)


@pytest.mark.parametrize(
    "text", ["", "some", "1/0", "0/4", "5/4", "-1/4", "0.5", "1 / 16", "ALL", "1/16/2", "\u0661/2"]
)
def test_anything_else_is_refused_with_what_to_write(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(WorkerConfig, [f"--verify-transfers={text}"], "worker", {})
    said = capsys.readouterr().err
    assert f"--verify-transfers: {text!r} is no share of the transfers; write all, none, or a fraction" in said


def test_one_in_sixteen_unless_told_otherwise() -> None:
    assert Share.parse(load(WorkerConfig, [], "worker", {}).verify_transfers) == Share.parse("1/16")
