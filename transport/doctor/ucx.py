"""Which UCX is in use, what it was built with and what it offers here.  Loads none of it into this process."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from transport.build import ucx_home, ucx_libraries
from transport.doctor.facts import Offer, Ucx

TIMEOUT_S = 20.0

_MEMORY = re.compile(r"(\w+)(?: \([^)]*\))?")


def look_at_ucx() -> Ucx:
    """Blocks, at most TIMEOUT_S.  Raises FileNotFoundError with what to do."""
    home, libraries = ucx_home(), ucx_libraries()
    ucx_info = home / "bin" / "ucx_info"
    offers, why = None, ""
    try:
        offers = parse_offers(_ask(ucx_info, libraries))
    except FileNotFoundError:
        why = f"there is no {ucx_info}"
    except (OSError, subprocess.SubprocessError) as e:
        why = str(e)
    names = {path.name.partition(".")[0].removeprefix("libuct_") for path in (libraries / "ucx").glob("libuct_*.so*")}
    return Ucx(str(home), "KVFERRY_UCX_HOME" not in os.environ, tuple(sorted(names)), offers, why)


def parse_offers(text: str) -> tuple[Offer, ...]:
    """From what ``ucx_info -d`` prints: memory domains, each followed by its transports with their devices."""
    offers: list[Offer] = []
    memory: tuple[str, ...] = ()
    transport = ""
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.lstrip("#").partition(":"))
        match name:
            case "Memory domain":
                memory = ()
            case "memory types":
                memory = tuple(_MEMORY.findall(value))
            case "Transport":
                transport = value
            case "Device":
                offers.append(Offer(transport, value, memory))
    return tuple(offers)


def _ask(ucx_info: Path, libraries: Path) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    return subprocess.run(
        [ucx_info, "-d"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, timeout=TIMEOUT_S, check=True,
    ).stdout  # fmt: skip
