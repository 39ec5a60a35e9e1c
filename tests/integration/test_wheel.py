"""The wheel: the client alone, light, and able to talk to a running gateway."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from tests.integration.conftest import Running

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys, time
began = time.process_time()  # of this process alone, whoever else is at work here
import kvferry
seconds = time.process_time() - began
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "services", "gateway", "transport"})
with kvferry.Client(sys.argv[1]) as client:
    answer = client.generate("1, 2, 3,", max_tokens=3, temperature=0).result()
print(seconds, heavy, len(answer.token_ids), kvferry.__file__)
"""


def test_the_wheel_installed_alone(cluster: Running, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("kvferry-*.whl")
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kvferry"}
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    program = [python, "-W", "error", "-c", PROGRAM, cluster.address]
    subprocess.run(program, cwd=tmp_path, check=True, capture_output=True)  # once, so that bytecode is there
    done = subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, text=True)
    seconds, rest = done.stdout.split(maxsplit=1)
    assert float(seconds) < 0.5
    assert rest.startswith("[] 3 ")
    assert str(tmp_path) in rest
