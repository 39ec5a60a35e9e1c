"""The command line against real clusters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import Running

ROOT = Path(__file__).resolve().parents[2]


def kvferry(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_demo(tmp_path: Path) -> None:
    done = kvferry("demo", "What is 2 + 2? " * 8, "--max-tokens", "8", "--log-dir", str(tmp_path), timeout_s=180)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("tokenize", "route", "prefill compute", "TTFT", "KV written", "exposed", "decode compute", "ITL"):
        assert words in done.stdout
    for name in ("directory", "prefill-0", "decode-0", "gateway"):
        log = (tmp_path / f"{name}.log").read_text()
        assert "Traceback" not in log, log
        assert f"{name} stopped" in done.stderr


def test_generate_and_status(cluster: Running) -> None:
    done = kvferry("generate", "1, 2, 3, 4,", "--max-tokens", "6", "--temperature", "0", "--address", cluster.address)
    assert done.returncode == 0, done.stderr
    assert "5" in done.stdout
    status = kvferry("status", "--json", "--address", cluster.address)
    assert status.returncode == 0, status.stderr
    assert "prefill-0" in json.dumps(json.loads(status.stdout))


def test_one_request_has_one_id_and_one_trace_in_every_log(cluster: Running) -> None:
    from kvferry import Client

    with Client(cluster.address) as client:
        client.generate(
            "Follow me through the logs. " * 8, max_tokens=2, temperature=0, request_id="follow-me"
        ).result()
    lines = [
        json.loads(line) for line in (cluster.local.log_dir / "gateway.log").read_text().splitlines() if line[:1] == "{"
    ]
    mine = [line for line in lines if line.get("request_id") == "follow-me"]
    assert {"route", "finished"} <= {line["event"] for line in mine}
    (trace,) = {line["trace_id"] for line in mine}
    assert len(trace) == 32
    for name in ("prefill-0", "decode-0"):
        text = (cluster.local.log_dir / f"{name}.log").read_text()
        assert any(
            line.get("request_id") == "follow-me" and line.get("trace_id") == trace
            for line in map(json.loads, (x for x in text.splitlines() if x[:1] == "{"))
        ), name
