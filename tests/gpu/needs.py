"""What `make test-gpu` and `make bench-gpu` cannot do without."""

from __future__ import annotations

from importlib.util import find_spec

TOOLS = ("pytest", "pytest_asyncio", "pytest_timeout", "hypothesis")


def no_torch() -> str | None:
    """One sentence, None where it is there."""
    if find_spec("torch") is None:
        return "torch is not installed: name a Python that has it for CUDA by PYTHON="
    return None


def why_not() -> str | None:
    """As ``no_torch``, of all that computes.  Without looking at whether kernels compile."""
    if reason := no_torch():
        return reason
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed: pip install kvferry[gpu]"
    return None


def missing_tools() -> str | None:
    """As ``why_not``, of what runs tests."""
    missing = [name for name in TOOLS if find_spec(name) is None]
    return f"{', '.join(missing)}: not installed; pip install kvferry[dev]" if missing else None
