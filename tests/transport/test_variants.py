"""The contract once more, in a process of its own: over tcp alone, and over a UCX of the distribution."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSTEM_UCX = Path("/usr/include/ucp/api/ucp.h")


def run_contract(**environment: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            "ucx",
            "tests/transport/test_contract.py",
        ],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("UCX_")}, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_contract_over_tcp_alone() -> None:
    run_contract(UCX_TLS="tcp,self", KVFERRY_TEST_PATH="RMA")


@pytest.mark.skipif(not SYSTEM_UCX.exists(), reason="apt-get install libucx-dev to run this")
def test_contract_over_the_distributions_ucx() -> None:
    run_contract(KVFERRY_UCX_HOME="/usr")
