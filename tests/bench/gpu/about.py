"""What measured: the device, and the versions that its figures are of."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess

import torch

from tests.bench.system.systems import ROOT


def describe(place: torch.device) -> dict[str, str | int | None]:
    """None: cannot be known here."""
    on_gpu = place.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(place) if on_gpu else "a rehearsal on the CPU",
        "num_devices": torch.cuda.device_count(),
        "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "flashinfer": _version("flashinfer-python"),
        "commit": _line("git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"),
    }


def _line(*command: str) -> str | None:
    """The first that it prints."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.split("\n")
    return lines[0].strip() or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
