"""docker/requirements.py: what images install."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("extras", "among", "not_among"),
    [
        (("gateway", "redis", "tls"), {"grpcio", "pydantic", "redis", "cryptography", "uvicorn"}, {"torch", "pytest"}),
        (("worker", "tls"), {"grpcio", "pydantic", "torch", "libucx-cu13"}, {"uvicorn", "pytest"}),
        ((), {"grpcio", "protobuf"}, {"pydantic"}),
    ],
)
def test_extras_bring_those_that_they_name(extras: tuple[str, ...], among: set[str], not_among: set[str]) -> None:
    command = [sys.executable, ROOT / "docker/requirements.py", *extras]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    names = {name_of(line) for line in lines}
    assert among <= names
    assert not names & (not_among | {"kvferry"})


def test_every_package_that_images_install_is_pinned() -> None:
    command = [sys.executable, ROOT / "docker/requirements.py", "gateway", "redis", "tls", "worker", "gpu"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name_of(line) for line in lines} <= pinned


def name_of(requirement: str) -> str:
    """As indexes normalize it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[><=,; \[]", requirement)[0]).lower()
