"""Which device a worker computes on.  No torch: a worker on CPU may do without."""

from __future__ import annotations

import importlib.util
import re

from kvferry.errors import InvalidRequestError
from transport.cuda import device_count


def choose_device(text: str) -> int | None:
    """The GPU that --device names, None for the CPU; looks for GPUs unless that is named.  Raises InvalidRequestError."""
    if text == "cpu":
        return None
    return pick_device(text, device_count(), has_kernels=importlib.util.find_spec("flashinfer") is not None)


def pick_device(text: str, num_gpus: int, *, has_kernels: bool) -> int | None:
    """Pure.  ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the first GPU where there is one and FlashInfer is installed."""
    if text == "cpu" or (text == "auto" and not (num_gpus and has_kernels)):
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", "cuda" if text == "auto" else text, re.ASCII)
    if match is None:
        raise InvalidRequestError(f"--device {text} is no device; write cpu, cuda, cuda:N or auto")
    number = int(match[1] or 0)
    if number >= num_gpus:
        raise InvalidRequestError(
            f"--device {text}: this process sees {num_gpus} GPUs; name another, or use --device cpu"
        )
    if not has_kernels:
        raise InvalidRequestError(
            f"--device {text} needs FlashInfer; pip install kvferry[worker,gpu], or use --device cpu"
        )
    return number
