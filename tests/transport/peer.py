"""Owners of regions on the other side: another transport in this process, or a real process (this file, run).

The process obeys lines on its standard input and answers each with one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import transport
from transport import Region

ROOT = Path(__file__).parents[2]


class InProcessPeer:
    def __init__(self, backend: str) -> None:
        self._transport = transport.create(backend)
        self._region: Region | None = None

    def allocate(self, nbytes: int, device: int | None = None) -> bytes:
        if self._region is not None:
            self._region.release()
        self._region = self._transport.allocate(nbytes, device)
        return self._region.descriptor

    def read(self, offset: int, nbytes: int) -> bytes:
        assert self._region is not None
        return bytes(self._region.fetch([offset], nbytes))

    def fill(self, offset: int, data: bytes) -> None:
        assert self._region is not None
        self._region.view[offset : offset + len(data)] = data

    def die(self) -> None:
        self._transport.close()

    def close(self) -> None:
        if self._region is not None:
            self._region.release()
        self._transport.close()


class ProcessPeer:
    def __init__(self, backend: str, **environment: str) -> None:
        self.reusable = True
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transport.peer", backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )

    def allocate(self, nbytes: int, device: int | None = None) -> bytes:
        return bytes.fromhex(self._ask(do="allocate", nbytes=nbytes, device=device))

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes.fromhex(self._ask(do="read", offset=offset, nbytes=nbytes))

    def fill(self, offset: int, data: bytes) -> None:
        self._ask(do="fill", offset=offset, data=data.hex())

    def num_open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> None:
        self.reusable = False
        self.process.send_signal(signal.SIGSTOP)

    def die(self) -> None:
        self.reusable = False
        self.process.kill()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()  # its end of file ends the peer
        try:
            self.process.wait(5)
        finally:
            self.process.kill()
            self.process.wait(5)
            self.process.stdout.close()

    def _ask(self, **request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


Peer = InProcessPeer | ProcessPeer


def serve(backend: str) -> None:
    peer = InProcessPeer(backend)
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "allocate":
                answer = peer.allocate(request["nbytes"], request["device"]).hex()
            case "read":
                answer = peer.read(request["offset"], request["nbytes"]).hex()
            case "fill":
                peer.fill(request["offset"], bytes.fromhex(request["data"]))
                answer = ""
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    peer.close()


if __name__ == "__main__":
    serve(sys.argv[1])
