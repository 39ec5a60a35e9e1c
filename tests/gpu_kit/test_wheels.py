"""Wheels come from an index, here one on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.gpu_kit.__main__ import Wheels
from tests.gpu_kit.packages import KitError
from tests.gpu_kit.parts import MIB
from tests.gpu_kit.test_parts import write_wheel


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Its folder: what lies in index/NAME is found as NAME.  Of pip's settings nothing else holds."""
    folder = tmp_path / "index"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
            monkeypatch.delenv(name, raising=False)
        yield folder
        server.shutdown()
        thread.join()


def test_a_wheel_for_another_python_comes_once_and_tells_how_far_it_is(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (index / "big").mkdir()
    made = write_wheel(index / "big", "big", "big", "#" * (9 * MIB), "Requires-Dist: other>=2\n")
    made.rename(made.with_name("big-1.0-cp312-cp312-manylinux_2_17_x86_64.whl"))
    wheels = Wheels(tmp_path / "wheels", "3.12", "2.28")
    assert wheels.requirements_of("big", "1.0") == ["other>=2"]
    assert "big==1.0: 9 of 9 MiB" in capsys.readouterr().out
    (index / "big" / "big-1.0-cp312-cp312-manylinux_2_17_x86_64.whl").unlink()
    assert wheels.fetch("big", "1.0").stat().st_size > 9 * MIB


def test_what_cannot_be_had_is_told_in_pips_words(index: Path, tmp_path: Path) -> None:
    (index / "big").mkdir()
    made = write_wheel(index / "big", "big", "big", "")
    made.rename(made.with_name("big-1.0-cp312-cp312-manylinux_2_39_x86_64.whl"))
    wheels = Wheels(tmp_path / "wheels", "3.12", "2.28")
    with pytest.raises(KitError, match=r"(?s)cannot download big==1\.0:.*No matching distribution"):
        wheels.fetch("big", "1.0")
    assert Wheels(tmp_path / "wheels", "3.12", "2.39").fetch("big", "1.0").exists()
