"""kvferry doctor: the real examination, and what becomes of those that end badly."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvferry
from kvferry.cli import make_app
from tests.cli.test_commands import Terminal, kvferry_command

ROOT = Path(__file__).resolve().parents[2]
APP = make_app(rich=False)
MODULE = importlib.import_module("kvferry.cli.doctor")  # in the package its command has the name
FINE = {"section": "UCX", "level": "ok", "text": "UCX 1.22.0", "change": ""}
WARNING = {"section": "UCX", "level": "warning", "text": "UCX_TLS=tcp", "change": "Unset [UCX_TLS]."}
BROKEN = {"section": "Speed", "level": "broken", "text": "the data differs", "change": "Do not use this host."}


def processes_with(variable: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if variable.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue  # it has ended, or is another user's
    return found


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose examination is the file to write at the path returned."""
    examination = tmp_path / "transport" / "doctor" / "__main__.py"
    examination.parent.mkdir(parents=True)
    (tmp_path / "transport" / "__init__.py").touch()
    monkeypatch.setattr(MODULE, "clone_root", lambda *words: tmp_path)
    return examination


def finding(clone: Path, *findings: dict[str, str]) -> None:
    broken = any(each["level"] == "broken" for each in findings)
    document = json.dumps({"findings": findings, "broken": broken})
    clone.write_text(f"import sys\nprint('measuring', file=sys.stderr)\nprint({document!r})\nsys.exit({int(broken)})\n")


def test_this_host_piped() -> None:
    done = kvferry_command("doctor", "--no-measure")
    assert done.returncode == 0, done.stderr
    headings = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert headings == ["UCX", "Neighbours on this host", "Other hosts", "CUDA", "Memory", "What to change"]
    assert "  ✓ a second process's pool was mapped" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.splitlines() == ["looking at this host", "default: starting two processes"]


def test_json_is_the_examination_as_it_is() -> None:
    done = kvferry_command("doctor", "--no-measure", "--json")
    report = json.loads(done.stdout)
    assert report["facts"]["trials"][0]["path"] == "mapped"
    assert report["broken"] is False


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    shell = Terminal("doctor", "--no-measure")
    yield shell
    shell.close()


def test_this_host_on_a_terminal_of_80_columns(terminal: Terminal) -> None:
    terminal.read_until("What to change")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.seen)
    assert max(map(len, re.split(r"[\r\n]+", shown))) <= 80
    whom = f"as the same user (this is user {os.geteuid()}) in the same PID namespace"
    assert whom in " ".join(shown.split()), "what does not fit goes on in the next line"
    assert "\x1b[1m" in terminal.seen
    assert terminal.process.wait(20) == 0


def test_what_to_change_comes_last_a_sentence_each(clone: Path) -> None:
    finding(clone, FINE, WARNING)
    done = CliRunner().invoke(APP, ["doctor"])
    assert done.stdout.splitlines() == [
        "UCX",
        "  ✓ UCX 1.22.0",
        "  ! UCX_TLS=tcp",
        "What to change",
        "  → Unset [UCX_TLS].",
    ]
    assert (done.stderr, done.exit_code) == ("measuring\n", 0)


def test_of_what_is_fine_nothing_is_to_be_changed(clone: Path) -> None:
    finding(clone, FINE)
    done = CliRunner().invoke(APP, ["doctor"])
    assert done.stdout.endswith("What to change\n  ✓ nothing\n")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_is_broken_is_exit_code_1(clone: Path, options: list[str]) -> None:
    finding(clone, FINE, BROKEN)
    done = CliRunner().invoke(APP, ["doctor", *options])
    assert done.exit_code == 1
    assert "Do not use this host." in done.stdout


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import no_such_module", "the examination ended with exit status 1; mend the installation with `make setup`"),
        ("import os; os.kill(os.getpid(), 11)", "the examination was killed by SIGSEGV; mend"),
    ],
)
def test_an_examination_that_does_not_end_well_is_one_sentence(clone: Path, code: str, sentence: str) -> None:
    clone.write_text(code)
    done = CliRunner().invoke(APP, ["doctor"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"kvferry: {sentence}" in done.stderr
    assert "no_such_module" not in code or "  | ModuleNotFoundError: No module named 'no_such_module'" in done.stderr


def test_an_examination_that_hangs_is_ended_with_all_it_started(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone.write_text("import signal, subprocess; subprocess.Popen(['sleep', '100']); signal.pause()")
    monkeypatch.setenv("KVFERRY_TEST_MARK", f"{os.getpid()}.hangs")
    monkeypatch.setattr(MODULE, "TIMEOUT_S", 0.5)
    done = CliRunner().invoke(APP, ["doctor"])
    assert done.exit_code == 1
    assert "kvferry: the examination was killed by SIGKILL" in done.stderr
    assert processes_with(f"KVFERRY_TEST_MARK={os.getpid()}.hangs") == []


def test_without_a_clone_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvferry, "__file__", str(tmp_path / "kvferry" / "__init__.py"))
    done = CliRunner().invoke(APP, ["doctor"])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "clone the repository and run `make setup && .venv/bin/kvferry doctor` there" in done.stderr


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupt_leaves_no_process_behind(signum: signal.Signals, status: int) -> None:
    mark = f"KVFERRY_TEST_MARK={os.getpid()}.{signum}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "doctor"],
        cwd=ROOT, env={**os.environ, name: value}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stdout is not None
    while "measuring" not in (line := process.stderr.readline()):
        assert line, "it ended before it measured"
    assert len(processes_with(mark)) == 4
    process.send_signal(signum)
    assert process.wait(20) == status
    assert process.stderr.read() == ("interrupted\n" if status == 130 else "")
    process.stdout.close()
    process.stderr.close()
    deadline = time.monotonic() + (30 if signum is signal.SIGKILL else 0)  # what nobody could stop ends by itself
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
