"""Which device a worker computes on.  No torch: a worker on CPU may do without."""

from __future__ import annotations

import importlib.util
import re

from kvferry.errors import InvalidRequestError
from transport.cuda import device_count


def choose_devices(text: str, num_ranks: int, *, compiled: bool) -> tuple[int | None, ...]:
    """For each rank a GPU, from the one that --device names on, or None for the CPU; looks for GPUs unless that is named.
    ``compiled``: by FlashInfer's kernels.  Raises InvalidRequestError."""
    if text == "cpu":
        return (None,) * num_ranks
    num_gpus = device_count()
    has_kernels = importlib.util.find_spec("flashinfer") is not None
    first = pick_device(text, num_gpus, has_kernels=has_kernels, compiled=compiled)
    return spread(first, num_ranks, num_gpus)


def spread(first: int | None, num_ranks: int, num_gpus: int) -> tuple[int | None, ...]:
    """Pure.  A GPU of its own for each rank."""
    if first is None:
        return (None,) * num_ranks
    if first + num_ranks > num_gpus:
        raise InvalidRequestError(
            f"--tp {num_ranks} from cuda:{first} on needs {first + num_ranks} GPUs, and this process sees {num_gpus}; "
            "lower --tp, or name an earlier GPU"
        )
    return tuple(range(first, first + num_ranks))


def pick_device(text: str, num_gpus: int, *, has_kernels: bool, compiled: bool) -> int | None:
    """Pure.  ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the first GPU where there is one and FlashInfer is installed.  A
    GPU that is named needs FlashInfer only where its kernels, the ``compiled`` ones, are to compute."""
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
    if compiled and not has_kernels:
        raise InvalidRequestError(
            f"--device {text} needs FlashInfer; pip install kvferry[worker,gpu], or use --kernels torch or --device cpu"
        )
    return number
