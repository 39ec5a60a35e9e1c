"""A process that computes and looks at nothing ends with the one that holds its leash."""

from __future__ import annotations

import socket
import subprocess
import sys

BUSY = """
import socket, sys
from services.worker.leash import end_with
end_with(socket.socket(fileno=int(sys.argv[1])), lambda: print("cleaned up", flush=True))
print("on the leash", flush=True)
while True:
    sum(range(10_000))
"""


def test_it_ends_when_the_other_end_is_closed() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", BUSY, str(theirs.fileno())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()])
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on the leash\n"
        ours.sendall(b"a message is no end")
        assert process.poll() is None
        ours.close()
        try:
            assert process.stdout.readline() == b"cleaned up\n"
            assert process.wait(30) == 1
        finally:
            process.kill()
