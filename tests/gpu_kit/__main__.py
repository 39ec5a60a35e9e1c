"""make gpu-kit: what kvferry and its GPU tests need on a machine with an NVIDIA GPU and no network, as files in
build/gpu-kit, each small enough to travel on its own.  Bring the folder to build/gpu-kit of a clone there and run its
install.sh.  docs/gpu.md says more."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from pathlib import Path

from tests.gpu_kit.modules import modules_in
from tests.gpu_kit.packages import MODEL, TOOLS, KitError, There, environment_of, lacking, pins_of, platforms
from tests.gpu_kit.parts import MIB, manifest_of, write_parts
from tests.gpu_kit.slim import UNUSED, slim

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
EXTRAS = ("gateway", "worker", "gpu")
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_TOLD_FROM = 8 * MIB  # smaller ones are there before anybody asks
_STEP = 0.2


class Wheels:
    """Wheels for another Python, downloaded into ``folder`` unless they lie there."""

    def __init__(self, folder: Path, python: str, glibc: str) -> None:
        self._folder = folder
        tags = (f"--platform={tag}" for tag in platforms(glibc))
        self._options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *tags]

    def fetch(self, name: str, version: str) -> Path:
        """Raises KitError with pip's words."""
        folder = self._folder / f"{name}-{version}"
        if not (found := list(folder.glob("*.whl"))):
            partial = self._folder / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            self._download(f"{name}=={version}", partial)
            partial.rename(folder)
            found = list(folder.glob("*.whl"))
        (wheel,) = found
        return wheel

    def _download(self, what: str, folder: Path) -> None:
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--progress-bar=raw",
            *self._options, "--dest", str(folder), what,
        ]  # fmt: skip
        said = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
            assert pip.stdout is not None
            told = 0.0
            for line in pip.stdout:
                progress = _PROGRESS.search(line)
                if progress is None:
                    said.append(line)
                    continue
                arrived, whole = map(int, progress.groups())
                if whole >= _TOLD_FROM and arrived >= told * whole:
                    print(f"  {what}: {arrived / MIB:.0f} of {whole / MIB:.0f} MiB", flush=True)
                    told = arrived / whole + _STEP
        if pip.returncode != 0:
            raise KitError(f"pip cannot download {what}:\n{''.join(said[-5:]).strip()}")

    def requirements_of(self, name: str, version: str) -> list[str]:
        with zipfile.ZipFile(self.fetch(name, version)) as wheel:
            (metadata,) = (entry for entry in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
            headers = BytesHeaderParser().parsebytes(wheel.read(metadata))
        return [str(line) for line in headers.get_all("Requires-Dist", ())]


def roots() -> Iterator[str]:
    command = [sys.executable, "docker/requirements.py", *EXTRAS]
    yield from subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    yield from TOOLS


def make(options: argparse.Namespace) -> None:
    environment = environment_of(options.python)
    pins = pins_of((ROOT / "constraints.txt").read_text(), environment)
    if options.flashinfer:
        pins["flashinfer-python"] = options.flashinfer
    there = There(options.there, options.freeze.read_text() if options.freeze else "")
    modules = modules_in(options.modules, pins["flashinfer-python"]) if options.modules else []
    cache = BUILD / f"gpu-kit-wheels-{options.python}"
    cache.mkdir(parents=True, exist_ok=True)
    wheels = Wheels(cache, options.python, options.glibc)
    print(f"looking for wheels of Python {options.python}, kept in {cache.relative_to(ROOT)}", flush=True)
    found = lacking(roots(), there, pins, environment, wheels.requirements_of)
    if options.model:  # of this package a file is wanted, and nothing that it asks for
        found[MODEL] = pins[MODEL]
    folder = BUILD / "gpu-kit"
    fetched = {name: wheels.fetch(name, version) for name, version in found.items()}
    for name, unused in UNUSED.items():
        if name in fetched:
            fetched[name] = slim(fetched[name], unused, cache / "slim")
    paths = sorted(fetched.values(), key=lambda path: path.stat().st_size)
    files = [*((f"wheels/{path.name}", path) for path in paths), *modules]
    contents = [(name, path.stat().st_size) for name, path in files]
    for name, nbytes in contents:
        print(f"  {nbytes / MIB:6.1f} MiB  {name}")
    parts = write_parts(files, folder, int(options.part_mib * MIB))
    (folder / "manifest").write_text(manifest_of(parts, options.python, contents))
    shutil.copy(Path(__file__).with_name("install.sh"), folder)
    print(f"in {folder.relative_to(ROOT)}, with manifest and install.sh:")
    for part in parts:
        print(f"  {part.nbytes / MIB:6.1f} MiB  {part.name}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-kit", description=__doc__)
    parser.add_argument("--python", default="3.12", help="the machine's (3.12)")
    parser.add_argument("--glibc", default="2.28", help="the machine has this or a later one (2.28)")
    parser.add_argument(
        "--there", nargs="+", default=[], metavar="NAME", help="packages that the machine has, besides torch"
    )
    parser.add_argument("--freeze", type=Path, help="the machine's `pip freeze`: what fits of it is left out")
    parser.add_argument(
        "--flashinfer", metavar="VERSION", help="another than constraints.txt's; 0.6.18.post1 is the smallest"
    )
    parser.add_argument(
        "--modules", type=Path, help="compiled kernels: a folder .cache/flashinfer/VERSION/ARCHITECTURE"
    )
    parser.add_argument("--without-model", dest="model", action="store_false", help="tests that need SmolLM2 will fail")
    parser.add_argument("--part-mib", type=float, default=56.0, help="the most that a part may have (56)")
    try:
        make(parser.parse_args())
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
