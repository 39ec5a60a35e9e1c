"""The wheel holds the client and nothing of the application."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("pyproject.toml", "README.md", "LICENSE")


def test_wheel_holds_only_kvferry(tmp_path: Path) -> None:
    # Built from a copy with links: setuptools leaves build/ and *.egg-info where it works.
    source, dist = tmp_path / "source", tmp_path / "dist"
    source.mkdir()
    for path in (*(ROOT / name for name in PACKAGED), *(p.parent for p in ROOT.glob("*/__init__.py"))):
        (source / path.name).symlink_to(path)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source)],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (wheel,) = dist.glob("kvferry-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kvferry"}
    assert {
        "kvferry/py.typed",
        "kvferry/client.py",
        "kvferry/cli/leash.py",
        "kvferry/api/inference/v1/inference_pb2.py",
        "kvferry/api/inference/v1/inference_pb2.pyi",
    } <= set(names)
    assert "kvferry = kvferry.cli:main" in entry_points
