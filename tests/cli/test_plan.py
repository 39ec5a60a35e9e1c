"""kvferry plan: the real planner on a small trace, and what is wrong said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry.bench.workload import read_trace
from kvferry.cli import make_app
from services.planner.__main__ import main
from tests.cli.test_commands import kvferry_command
from tests.sdk.fake_gateway import FakeGateway


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:17:{s:02d}.{f}000000,{500 + 37 * s},{10 + s}" for s in range(60) for f in (1, 5)]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines))
    return path


QUICK = ("--devices", "h100", "--seeds", "1", "--no-sensitivity", "--slo", "ttft=1s,itl=50ms")


def test_terminal_json_and_page(trace: Path, tmp_path: Path) -> None:
    page, document = tmp_path / "out.html", tmp_path / "out.json"
    written = ("--html", str(page), "--json", str(document))
    done = kvferry_command("plan", str(trace), "--model", "llama-3.1-8b", *QUICK, *written, "--patience", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(document.read_text())
    assert report["load"]["num_requests"] == 120
    assert ["patience of the gateway's line", "1"] in report["assumptions"]
    assert report["verdict"]["headline"] in done.stdout
    assert f"For 99%: {report['strict_verdict']['headline']}" in done.stdout
    assert "1 x h100, chunks of " in done.stdout
    assert "prefill : decode = " in done.stdout
    (line,) = (
        line for line in done.stdout.splitlines() if line.startswith("prefill's share from its begin to its end: ")
    )
    shares = line.rpartition(": ")[2]
    assert len(shares) == 48
    assert set(shares) <= set("▅▆▇█")  # mostly prompts, from begin to end
    assert "FLOP/byte on h100, where memory bounds what has less than 211: " in done.stdout
    assert "; decode, batch of 32 " in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert report["verdict"]["headline"] in page.read_text()
    assert done.stderr.splitlines() == [f"wrote {page}", f"wrote {document}"]
    assert "\x1b" not in done.stdout


def test_a_plan_for_what_gateways_serve(tmp_path: Path) -> None:
    written, document = tmp_path / "traffic.csv", tmp_path / "out.json"
    with FakeGateway() as one, FakeGateway() as other:
        done = kvferry_command(
            "plan",
            "--live",
            f"{one.address},{other.address}",
            *QUICK,
            "--trace-out",
            str(written),
            "--json",
            str(document),
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("meta-llama/Llama-3.1-8B-Instruct answered 240 requests in the last 6")
    assert "75.0% of them within ttft=1s,itl=50ms; TTFT p50 0.1, p99 3 s, ITL p50 30 ms" in done.stdout
    report = json.loads(document.read_text())
    load = report["load"]
    assert (report["model"], load["num_requests"]) == ("llama-3.1-8b", 240)
    assert load["hit_rate"] == pytest.approx(256 / 1095, rel=0.01)
    assert load["requests_per_s"] == pytest.approx(4, rel=0.02)
    asks = read_trace(written)
    assert [ask.num_cached_tokens for ask in asks] == [256] * 240
    assert asks[-1].at_s - asks[0].at_s == pytest.approx(60, abs=0.6)  # the gateways are asked in turn


def test_what_is_wrong_is_said(trace: Path) -> None:
    done = kvferry_command("plan", str(trace), "--model", "llama-9", *QUICK)
    assert (done.returncode, done.stdout) == (1, "")
    (sentence,) = done.stderr.splitlines()
    assert "neither a config.json nor one of smollm2-135m" in sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--slo", "ttft=1"), "is no objective"),
        (("--speed", "0"), "--speed must be above 0"),
        (("--rate", "-1"), "--rate must be above 0"),
        (("--patience", "-1"), "--patience must be 0 or more"),
        (("--patience", "inf"), "--patience must be 0 or more"),
        (("--rate", "1", "--speed", "2"), "it goes without --rate"),
        (("--live", "127.0.0.1:1"), "name a trace, or a gateway with --live"),
        (("--trace-out", "a.csv"), "--trace-out writes what --live hears"),
    ],
)
def test_what_the_client_sees_at_once(trace: Path, changes: tuple[str, ...], sentence: str) -> None:
    done = CliRunner().invoke(make_app(rich=False), ["plan", str(trace), "--model", "llama-3.1-8b", *changes])
    assert done.exit_code == 1
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--devices", "h101"), "has no device 'h101'; there are h100"),
        (("--hardware", "nowhere.toml"), "nowhere.toml cannot be read"),
        (("--dtype", "fp4"), "runs on none of h100"),
        (("--html", "/nowhere/out.html"), "/nowhere/out.html cannot be written"),
    ],
)
def test_what_the_planner_sees(
    trace: Path, changes: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trace), "--model", "llama-3.1-8b", "--requests", "100", *QUICK, *changes]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert sentence in json.loads(errors.splitlines()[-1])["error"]


def test_a_file_that_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    assert main([str(tmp_path / "a.csv"), "--model", "llama-3.1-8b", "--requests", "100", *QUICK]) == 1
    assert "a.csv: entry 1 is neither" in capsys.readouterr().err
