"""The end of install.sh, in the Python that it made: compiles kvferry's own parts and looks whether anything is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from services.engine import flashinfer_kernels
from services.engine.model_config import ModelError
from tests.gpu_kit.modules import place

ROOT = Path(__file__).parents[2]
BUILDS = ("transport.build", "services.engine.kernels.build", "services.directory.build", "services.planner.build")
# Each imports all that it needs before it says anything.
STARTS = (
    # Warnings of what that machine has are not this project's, as for tests.gpu.
    ("-m", "pytest", "--collect-only", "-q", "-W", "default", "-p", "no:cacheprovider", "tests/gpu"),
    ("-m", "tests.bench.gpu", "--help"),
    *(
        ("-m", service, "--help")
        for service in ("gateway", "services.directory", "services.prefill", "services.decode")
    ),
)
USED = [name for name in vars(flashinfer_kernels.FlashInfer) if not name.startswith("_")]
TIMEOUT_S = 600.0


def main(kit: Path) -> int:
    for module in BUILDS:
        if subprocess.run([sys.executable, "-m", module], cwd=ROOT, timeout=TIMEOUT_S, check=False).returncode != 0:
            return 1
    for command in STARTS:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            print(f"{done.stdout}{done.stderr}\ngpu-kit: python {' '.join(command)} ended with {done.returncode}")
            return 1
    print("tests/gpu, tests/bench/gpu and the services import all that they need", flush=True)
    if not _told(kit):
        return 1
    doctor = [sys.executable, "-m", "kvferry.cli", "doctor", "--no-measure"]
    return subprocess.run(doctor, cwd=ROOT, timeout=TIMEOUT_S, check=False).returncode


def _told(kit: Path) -> bool:
    """Prints what this Python has.  False where FlashInfer, or what is used of it, cannot be had."""
    seen = torch.cuda.is_available()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"GPU: {torch.cuda.get_device_name(0) if seen else 'none seen'}")
    spec = importlib.util.find_spec("flashinfer")
    try:
        kernels = flashinfer_kernels.load()
    except ModelError as error:
        print(f"gpu-kit: {error}")
        return False
    assert spec is not None
    assert spec.origin is not None
    version = vars(kernels)["__version__"]
    if missing := [name for name in USED if not hasattr(kernels, name)]:
        print(f"gpu-kit: FlashInfer {version} has no {', '.join(missing)}")
        return False
    print(f"FlashInfer {version}")
    capability = torch.cuda.get_device_capability(0) if seen else None
    print(f"modules: {place(kit / 'modules', Path(spec.origin).parent, version, capability)}")
    for tool, why in (("nvcc", "compiles FlashInfer's kernels"), ("ninja", "starts nvcc")):
        print(f"{tool}: {_where(tool) or f'not found; it {why}'}", flush=True)
    return True


def _where(tool: str) -> str | None:
    """As FlashInfer finds it, with venv/bin on the PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(sys.executable).parent), *(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")]
    return shutil.which(tool, path=os.pathsep.join(folders))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
