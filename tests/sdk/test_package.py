"""What `import kvferry` promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kvferry

ROOT = Path(__file__).resolve().parents[2]


def test_all_is_sorted_complete_and_real() -> None:
    public = {name for name in vars(kvferry) if not name.startswith("_")}
    submodules = {"aio", "api", "bench", "cli", "client", "errors", "types", "annotations"}
    assert set(kvferry.__all__) == (public - submodules) | {"__version__"}
    assert kvferry.__all__ == sorted(kvferry.__all__)


def test_every_error_is_reexported() -> None:
    from kvferry import errors

    tree = {cls.__name__ for cls in errors.Error.__subclasses__()} | {"Error"}
    assert tree <= set(kvferry.__all__)


def test_import_is_light_and_fast() -> None:
    code = (
        "import json, sys, time; began = time.process_time(); import kvferry; took = time.process_time() - began\n"
        "print(json.dumps([took, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)
        for _ in range(3)
    ]
    loaded = set(runs[0][1])
    assert not loaded & {"torch", "numpy", "typer", "rich", "gateway", "services", "transport"}
    assert min(took for took, _ in runs) < 0.5  # CPU time: what else the machine does is not kvferry's doing


def test_version_is_the_one_of_the_distribution() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", kvferry.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "kvferry._version.__version__"
