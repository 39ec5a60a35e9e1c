"""Runs a command that dies with the process that started it: ``python leash.py <parent's pid> command ...``.

The kernel sends SIGKILL when the parent's thread that started this process ends, however it ends; the setting outlives
exec.  A process of its own does this, because code between fork and exec is unsafe in a parent with threads.  Imports
nothing of kvferry, so that it costs milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the kernel knew what to do then
        sys.exit("the process that started this one has ended")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
