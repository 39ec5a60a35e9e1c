"""A few cases for each reader of what strangers send; ``make fuzz`` has more.  And that a checkpoint brings no code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from services.engine.hf_checkpoint import weight_files
from services.engine.model_config import ModelError
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_is_sent_is_taken_or_refused_by_name(target: Target) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def read(case: object) -> None:
        target.read(case)

    read()


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
