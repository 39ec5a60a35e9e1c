"""A few cases for each reader of what strangers send; ``make fuzz`` has more.  And that a checkpoint brings no code."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings

from services.engine.hf_checkpoint import weight_files
from services.engine.model_config import ModelError
from tests.fuzz.__main__ import finding_of, seeds_of
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_is_sent_is_taken_or_refused_by_name(target: Target) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def read(data: bytes) -> None:
        target.read(data)

    read()


@pytest.mark.parametrize("target", [t for t in TARGETS if t.mutate], ids=lambda target: target.name)
def test_what_keeps_its_form_is_read_too(target: Target) -> None:
    """And in the end some of it is taken: behind the first check something is read."""
    whole = [data for data in seeds_of(target, 1, 40) if target.read(data)]
    whole = whole or [data for data in seeds_of(target, 2, 400) if target.read(data)]
    assert whole
    assert target.mutate is not None
    taken = False
    for number in range(1000):
        random = Random(number)
        changed = target.mutate(random.choice(whole), random)
        if changed is not None:
            taken |= target.read(changed)
        if taken and number > 10:
            return
    pytest.fail("nothing was taken")


def test_a_run_without_cases_is_afinding_of_and_a_crash_says_how_to_replay_it() -> None:
    target = TARGETS[0]
    assert finding_of(target, 0, 0, 0, "") == "ran no case"
    assert "took no case" in str(finding_of(target, 0, 1000, 0, ""))
    assert finding_of(target, 0, 1000, 1, "") is None
    crashed = finding_of(target, 77, 5, 1, "Traceback\nTest unit written to /x/crash-1\n")
    assert crashed is not None
    assert crashed.endswith(f"replay: python -m tests.fuzz --only {target.name} --replay /x/crash-1")


@pytest.mark.parametrize(("damage", "kind"), [("raise ValueError", "crash"), ("while True: pass", "timeout")])
def test_what_raises_or_hangs_is_found(damage: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install '.[fuzz]'")
    (tmp_path / "broken.py").write_text(
        "from tests.fuzz.target import Target\nfrom hypothesis import strategies as st\n"
        f"def read(data):\n    if data[:2] == b'ab': {damage}\n    return True\n"
        "TARGETS = [Target('broken', st.just(b''), read)]\n"
    )
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "1").write_bytes(b"a")
    command = [sys.executable, "-m", "tests.fuzz.worker", "broken", "broken", str(tmp_path / "counts"), "-timeout=1",
               "-runs=100000000", f"-artifact_prefix={tmp_path}/", str(tmp_path / "seeds")]  # fmt: skip
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=120, check=False
    )
    assert done.returncode
    assert [file.read_bytes()[:2] for file in tmp_path.glob(f"{kind}-*")] == [b"ab"]
    assert struct.unpack("<QQ", (tmp_path / "counts").read_bytes())[0] > 0


class Runs:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Runs(trap)))
    assert trap.exists(), "the trap works"
    trap.unlink()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(trap)))
    with pytest.raises(ModelError, match="pickled weights only"):
        weight_files(tmp_path)
    assert not trap.exists()
