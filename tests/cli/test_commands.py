"""The commands that talk to a gateway, in this process and as a real one with pipes and terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvferry
from gateway.doorkeeper import read_keys
from kvferry import Client
from kvferry.api.inference.v1 import inference_pb2
from kvferry.cli import make_app
from kvferry.cli.status import summary
from tests.sdk.fake_gateway import FakeGateway, answer, refuse

ROOT = Path(__file__).resolve().parents[2]
APP = make_app(rich=False)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    """Also what KVFERRY_ADDRESS names."""
    with FakeGateway(answer("Pa", "ris", ".")) as gateway:
        monkeypatch.setenv("KVFERRY_ADDRESS", gateway.address)
        yield gateway


def kvferry_command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvferry.cli", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip


def test_generate_streams_the_answer_to_stdout_alone(gateway: FakeGateway) -> None:
    done = CliRunner().invoke(APP, ["generate", "The capital of France is", "--max-tokens", "8", "--stop", "\n"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "Paris.\n", "")
    (request,) = gateway.requests
    assert isinstance(request, inference_pb2.GenerateRequest)
    assert (request.text, request.sampling.max_tokens, list(request.stop)) == ("The capital of France is", 8, ["\n"])


def test_generate_reads_stdin(gateway: FakeGateway) -> None:
    assert CliRunner().invoke(APP, ["generate", "-"], input="from a pipe").exit_code == 0
    (request,) = gateway.requests
    assert isinstance(request, inference_pb2.GenerateRequest)
    assert request.text == "from a pipe"


@pytest.mark.parametrize(("flags", "sent"), [([], None), (["--speculate"], True), (["--no-speculate"], False)])
def test_speculation_is_asked_for_or_left_to_the_worker(
    gateway: FakeGateway, flags: list[str], sent: bool | None
) -> None:
    assert CliRunner().invoke(APP, ["generate", "x", *flags]).exit_code == 0
    assert CliRunner().invoke(APP, ["chat", *flags], input="Hi\n").exit_code == 0
    for request in gateway.requests:
        assert isinstance(request, inference_pb2.GenerateRequest)
        assert (request.sampling.speculate if request.sampling.HasField("speculate") else None) is sent


def test_generate_json(gateway: FakeGateway) -> None:
    done = CliRunner().invoke(APP, ["generate", "x", "--json"])
    value = json.loads(done.stdout)
    assert (value["text"], value["finish_reason"], value["seed"]) == ("Paris.", "stop", 7)
    assert value["usage"] == {"num_prompt_tokens": 40, "num_output_tokens": 3, "num_cached_tokens": 16}
    assert value["timeline"]["transfer"]["num_bytes"] == 6_000_000
    assert [token["id"] for token in value["tokens"]] == [100, 101, 102]


def test_generate_timeline_tells_every_stage(gateway: FakeGateway) -> None:
    done = CliRunner().invoke(APP, ["generate", "x", "--timeline"])
    text, _, shown = done.stdout.partition("timeline\n")
    assert text == "Paris.\n"
    rows = {line[:18].strip(): line[18:].strip() for line in shown.splitlines()}
    assert rows["tokenize"].startswith("1.5 ms")
    assert "shipping pays" in rows["route"]
    assert "prefill-0" in rows["prefill queue"]
    assert "24 tokens in 2 chunk(s), 16 found in the cache" in rows["prefill compute"]
    assert rows["first token (TTFT)"].startswith("80.0 ms")
    assert "3 blocks, 6,000,000 bytes (5.7 MiB) by mapped at 3.00 GB/s" in rows["KV written"]
    assert rows["KV written"].endswith("66.7 % while the prompt was computed")
    assert rows["exposed transfer"].startswith("900 us")
    assert rows["of it, verifying"].startswith("250 us")
    assert "1.29 % of the compute" in rows["exposed transfer"]
    assert rows["handover"].startswith("1.5 ms")
    assert "decode-0, 12 steps" in rows["decode compute"]
    assert rows["ITL p50"].startswith("20.0 ms")
    assert rows["ITL p99"].startswith("31.0 ms")
    assert "3 tokens" in rows["total"]


def test_generate_timeline_draws_the_phases_on_one_axis(gateway: FakeGateway) -> None:
    done = CliRunner().invoke(APP, ["generate", "x", "--timeline"])
    drawn, _, _ = done.stdout.partition("timeline\n")[2].partition("where the time went\n")
    lines = drawn.splitlines()
    assert max(map(len, lines)) == 80
    bars = {line[:20].strip(): line[20:] for line in lines}
    # 400 ms on 60 columns: the prompt's from 7 to 77 ms, the first chunk's until 47 ms.
    assert bars["prefill compute"] == " ######====="
    assert bars["KV written"] == "       #   ="


def test_address_flag_wins_over_the_environment(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_ADDRESS", "127.0.0.1:1")
    assert CliRunner().invoke(APP, ["generate", "x", "--address", gateway.address]).exit_code == 0


def test_status_table(gateway: FakeGateway) -> None:
    done = CliRunner().invoke(APP, ["status"])
    first, heading, prefill, decode = done.stdout.splitlines()
    assert first == "tiny, 2 workers, 2 requests in flight, 41 in total, view 0.2 s old, kvferry 0.1.0"
    assert heading.split()[:4] == ["worker", "state", "run", "wait"]
    assert " ".join(prefill.split()) == "prefill-0 ready 2 1 812 48 60 20 7 15 4 1 100"
    assert decode.split()[:2] == ["decode-0", "drain"]


def test_status_says_when_no_directory_answers(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        cluster = client.cluster()
    assert "view 31.2 s old (no directory answers), " in summary(replace(cluster, view_age_s=31.2))


def test_status_json(gateway: FakeGateway) -> None:
    value = json.loads(CliRunner().invoke(APP, ["status", "--json"]).stdout)
    assert value["workers"][0]["role"] == "prefill"
    assert value["workers"][0]["blocks"]["quarantined"] == 1
    assert value["view_age_s"] == 0.25


def test_explain_shows_every_option_of_every_attempt(gateway: FakeGateway) -> None:
    done = CliRunner().invoke(APP, ["explain", "r-1"])
    assert done.exit_code == 0
    assert [request.request_id for request in gateway.requests] == ["r-1"]  # type: ignore[attr-defined]
    title, reason, heading, chosen, full, passed, second, why, *_ = done.stdout.splitlines()
    assert title == "attempt 1, 4.2 s ago, view 0.3 s old then, 512 prompt tokens, times in ms"
    assert reason == "prefill on prefill-0, decode on decode-0"
    assert heading.split() == [
        "prefill", "decode", "cache", "queue", "pull", "fill", "ship", "lost", "decode", "total",
    ]  # fmt: skip
    assert chosen.split() == [
        "*",
        "prefill-0",
        "decode-0",
        "32/16",
        "250.0",
        "35.0",
        "500.0",
        "12.5",
        "15.0",
        "1500",
        "2312",
    ]
    assert full.split() == ["full", "-", "decode-1", "0/0", "0.0", "0.0", "500.0", "0.0", "2500", "1500", "4500"]
    assert passed == "not decode-2: draining"
    assert second.startswith("attempt 2, 4.1 s ago")
    assert why == "no decode worker has joined the cluster"
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_explain_json(gateway: FakeGateway) -> None:
    value = json.loads(CliRunner().invoke(APP, ["explain", "r-1", "--json"]).stdout)
    first, second = value["decisions"]
    assert first["options"][0]["total_s"] == 2.3125
    assert [first["options"][0][key] for key in ("pull_worker", "num_pulled_tokens")] == ["decode-0", 160]
    assert first["passed_over"] == {"decode-2": "draining"}
    assert second["options"] == []


def test_explain_of_a_request_nobody_knows(gateway: FakeGateway) -> None:
    gateway.failures = [kvferry.NotFoundError("request 'x' is not among the last 1000 that this gateway routed")]
    done = CliRunner().invoke(APP, ["explain", "x"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "kvferry: request 'x' is not among the last 1000 that this gateway routed\n"


def test_status_watch_goes_on_until_interrupted(gateway: FakeGateway) -> None:
    command = [sys.executable, "-m", "kvferry.cli", "status", "--watch", "--interval", "0.1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first, second = json.loads(process.stdout.readline()), json.loads(process.stdout.readline())
        assert first == second
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", [["generate", "x"], ["status"], ["chat"]])
def test_no_gateway_is_one_sentence_that_says_what_to_do(command: list[str]) -> None:
    with FakeGateway() as gone:
        address = gone.address
    done = kvferry_command(*command, "--address", address, stdin="hi\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"kvferry: no gateway answers at {address}; start a cluster with `kvferry serve`, or name another gateway "
        "with --address, or the authority of its certificate with --tls-ca\n"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (kvferry.InvalidRequestError("max_tokens must be > 0"), "kvferry: max_tokens must be > 0\n"),
        (kvferry.OverloadedError("too much", retry_after_s=90), "kvferry: too much (try again in 90 s)\n"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(gateway: FakeGateway, error: kvferry.Error, sentence: str) -> None:
    gateway.scripts = [refuse(error)]
    done = CliRunner().invoke(APP, ["generate", "x", "--timeout", "10"])
    assert (done.exit_code, done.stderr) == (1, sentence)


def test_timeout_is_one_sentence(gateway: FakeGateway) -> None:
    gateway.scripts = [gateway.hang]
    done = CliRunner().invoke(APP, ["generate", "x", "--timeout", "0.2"])
    assert done.exit_code == 1
    assert re.fullmatch(r"kvferry: the gateway at \S+ did not finish within .* --timeout\n", done.stderr)


@pytest.mark.parametrize(
    "command", [["generate"], ["generate", "x", "--top-k", "many"], ["nonsense"], ["serve", "--decode", "0"]]
)
def test_wrong_usage_is_exit_code_2(command: list[str]) -> None:
    done = CliRunner().invoke(APP, command)
    assert done.exit_code == 2
    assert "Usage: kvferry" in done.stderr


def test_version_and_help() -> None:
    assert kvferry_command("--version").stdout == f"kvferry {kvferry.__version__}\n"
    for command in ([], ["demo"], ["serve"], ["generate"], ["chat"], ["status"]):
        shown = CliRunner().invoke(APP, [*command, "--help"])
        assert shown.exit_code == 0
        assert "kvferry chat" in shown.stdout if not command else f"    kvferry {command[0]}" in shown.stdout
        assert shown.stdout.isascii(), "piped help has no frames"


def test_a_reader_that_leaves_early_is_no_traceback(gateway: FakeGateway) -> None:
    gateway.scripts = [answer(*["words " * 1000] * 200)]
    with subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "generate", "x"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == b""


def test_ctrl_c_stops_generate_and_its_compute(gateway: FakeGateway) -> None:
    gateway.scripts = [gateway.hold]
    with subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "generate", "x"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3) == b"one"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == b"interrupted\n"
    assert gateway.cancelled.wait(10)


def test_chat_with_a_pipe_keeps_history(gateway: FakeGateway) -> None:
    done = kvferry_command(
        "chat", "--system", "Be brief.", stdin="Capital of France?\n\nSure?\n/reset\nAgain\n/exit\nnot sent\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Paris.\n" * 3, "")
    conversations = [
        [(message.role, message.content) for message in request.chat.messages]
        for request in gateway.requests
        if isinstance(request, inference_pb2.GenerateRequest)
    ]
    system = ("system", "Be brief.")
    assert conversations == [
        [system, ("user", "Capital of France?")],
        [system, ("user", "Capital of France?"), ("assistant", "Paris."), ("user", "Sure?")],
        [system, ("user", "Again")],
    ]


class Terminal:
    """A pseudo-terminal with a command on it."""

    def __init__(self, *arguments: str) -> None:
        self.descriptor, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvferry.cli", *arguments],
            stdin=inner, stdout=inner, stderr=inner, cwd=ROOT, env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self.seen = self.unread = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read_until(self, words: str) -> None:
        """Reads on from where the last call found its words; fails with what came instead."""
        deadline = time.monotonic() + 30
        while not self._found(words):
            assert time.monotonic() < deadline, f"{words!r} not in {self.unread!r} after {self.seen!r}"
            self._read(1)

    def interrupt_until(self, words: str) -> None:
        """Ctrl-C, and again when nothing comes of it: input() misses one that comes just before it blocks."""
        deadline = time.monotonic() + 30
        while not self._found(words):
            assert time.monotonic() < deadline, f"{words!r} not in {self.unread!r} after {self.seen!r}"
            self.process.send_signal(signal.SIGINT)
            while self._read(1) and words not in self.unread:
                pass

    def _found(self, words: str) -> bool:
        before, found, after = self.unread.partition(words)
        if found:
            self.seen += before + found
            self.unread = after
        return bool(found)

    def _read(self, timeout_s: float) -> bool:
        """Takes what has come; False when nothing did."""
        if not select.select([self.descriptor], [], [], timeout_s)[0]:
            return False
        try:
            piece = os.read(self.descriptor, 4096).decode(errors="replace")
        except OSError:  # how a pseudo-terminal says that everybody left
            piece = ""
        assert piece, f"the command left after {self.seen + self.unread!r}"
        self.unread += piece
        return True

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.descriptor)


@pytest.fixture
def terminal() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for each in opened:
        each.close()


def test_chat_on_a_terminal(gateway: FakeGateway, terminal: list[Terminal]) -> None:
    fine = gateway.scripts[0]
    gateway.scripts = [gateway.hold, refuse(kvferry.InvalidRequestError("too long")), fine]
    shell = Terminal("chat")
    terminal.append(shell)
    shell.read_until("tiny: /reset")
    shell.read_until("> ")
    shell.type("first\n")
    shell.read_until("one")
    shell.interrupt_until("[stopped]")
    shell.read_until("> ")
    shell.interrupt_until("> ")  # at the prompt: a new prompt
    shell.type("second\n")
    shell.read_until("kvferry: too long")
    shell.read_until("> ")
    shell.type("third\n")
    shell.read_until("Paris.")
    shell.read_until("> ")
    shell.type("\x04")
    assert shell.process.wait(20) == 0
    last = gateway.requests[-1]
    assert isinstance(last, inference_pb2.GenerateRequest)
    assert [m.content for m in last.chat.messages] == ["first", "one", "third"], "a refused message is forgotten"


def test_a_terminal_of_80_columns_shows_every_column_whole(gateway: FakeGateway, terminal: list[Terminal]) -> None:
    shell = Terminal("status")
    terminal.append(shell)
    shell.read_until("decode-0")
    assert "prefill-0" in shell.seen, "no name is folded"
    assert all(word in shell.seen for word in ("worker", "active", "cached", "quar."))
    assert shell.process.wait(20) == 0


def test_a_key_is_printed_once_and_its_hash_is_what_gateways_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    texts = []
    for tenant in ("search", "docs"):
        done = CliRunner().invoke(APP, ["key", tenant, "--file", str(path)])
        assert done.exit_code == 0
        texts.append(done.stdout.strip())
    assert path.stat().st_mode & 0o777 == 0o600
    assert not any(text in path.read_text() for text in texts)
    keys = read_keys(path)
    tenants = [keys.tenant_of(text) for text in texts]
    assert [tenant and tenant.name for tenant in tenants] == ["search", "docs"]
    assert CliRunner().invoke(APP, ["key", "no spaces"]).exit_code == 2
    done = CliRunner().invoke(APP, ["key", "x", "--file", str(tmp_path / "none" / "keys")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "No such file" in done.stderr


def test_a_key_comes_from_the_environment(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_API_KEY", "kvf-1")
    assert CliRunner().invoke(APP, ["generate", "x"]).exit_code == 0
    assert gateway.metadata[-1]["authorization"] == "Bearer kvf-1"
