"""The test's end of a hostile peer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2
from services.engine.layout import KvLayout
from services.worker.convert import to_layout_proto

ROOT = Path(__file__).parents[3]
NUM_SLOTS = 40


class Peer:
    """See ``__main__.py``.  Each method returns when the peer has done it."""

    def __init__(
        self, layout: KvLayout, environment: Mapping[str, str], worker_id: str = "hostile", listen: str = "127.0.0.1:0"
    ) -> None:
        self.layout = layout
        told = {"layout": asdict(layout), "num_slots": NUM_SLOTS, "worker_id": worker_id, "listen": listen}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.hostile", json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        info = self.ask("describe")
        self.worker_id: str = info["worker_id"]
        self.incarnation: int = info["incarnation"]
        self.control_address: str = info["control_address"]
        self.region = bytes.fromhex(info["region"])
        self._process_identity = directory_pb2.ProcessIdentity(**info["process"])

    def writer(self) -> worker_pb2.Writer:
        return worker_pb2.Writer(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            control_address=self.control_address,
            process=self._process_identity,
        )

    def ticket(
        self, writer: directory_pb2.WorkerInfo, prompt: Sequence[int], blocks: Sequence[int], **change: Any
    ) -> worker_pb2.Ticket:
        """For the KV of a prompt in slots of the peer's."""
        ticket: dict[str, Any] = {
            "transfer_id": uuid4().hex,
            "request_id": "from a hostile owner",
            "epoch": 1,
            "owner_id": self.worker_id,
            "owner_incarnation": self.incarnation,
            "owner_control_address": self.control_address,
            "writer_id": writer.worker_id,
            "writer_incarnation": writer.incarnation,
            "region": self.region,
            "layout": to_layout_proto(self.layout),
            "blocks": blocks,
            "num_prompt_tokens": len(prompt),
            "expires_in_ms": 60_000,
        }
        return worker_pb2.Ticket(**{**ticket, **change})

    def behave(self, **behaviour: Any) -> None:
        self.ask("behave", **behaviour)

    def write(self, ticket: worker_pb2.Ticket, slots: Sequence[int], blocks: Sequence[int] | None = None) -> str:
        """Into the ticket's blocks unless told otherwise; "" or what went wrong."""
        error: str = self.ask("write", **_where(ticket, slots, blocks))
        return error

    def write_on(self, ticket: worker_pb2.Ticket, slots: Sequence[int], blocks: Sequence[int] | None = None) -> None:
        """Over and over, until the peer honours a StopTransfer."""
        self.ask("write_on", **_where(ticket, slots, blocks))

    def commit(
        self,
        ticket: worker_pb2.Ticket,
        slots: Sequence[int],
        first_token: int = 0,
        indices: Sequence[int] | None = None,
        **change: Any,
    ) -> dict[str, str]:
        """The owner's answer: "error" is empty or the error's class, "reason" and "message" go with it."""
        first = ticket.first_block_index
        answer: dict[str, str] = self.ask(
            "commit",
            ticket=ticket.SerializeToString().hex(),
            slots=list(slots),
            indices=list(indices or range(first, first + len(slots))),
            first_token=first_token,
            change=change,
        )
        return answer

    def abort(self, ticket: worker_pb2.Ticket, **change: Any) -> dict[str, str]:
        answer: dict[str, str] = self.ask("abort", ticket=ticket.SerializeToString().hex(), change=change)
        return answer

    def heard(self, rpc: str) -> list[dict[str, Any]]:
        return [message for message in self.ask("heard") if message["rpc"] == rpc]

    def fill(self, slots: Sequence[int], value: int) -> None:
        self.ask("fill", slots=list(slots), value=value)

    def hashes(self, slots: Sequence[int] = range(NUM_SLOTS)) -> list[int]:
        hashes: list[int] = self.ask("hashes", slots=list(slots))
        return hashes

    def release(self) -> None:
        self.ask("release")

    def hang(self) -> None:
        """Returns when none of its threads runs."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Returns when the process has ended."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, do: str, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def _where(ticket: worker_pb2.Ticket, slots: Sequence[int], blocks: Sequence[int] | None) -> dict[str, Any]:
    into = ticket.blocks if blocks is None else blocks
    return {"ticket": ticket.SerializeToString().hex(), "slots": list(slots), "blocks": list(into)}
