"""What is kept of measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.engine.kernels import ceilings
from services.engine.phases import Ceilings


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32", "float16"])
def test_a_processor_does_something(dtype: str) -> None:
    measured = ceilings.measure(dtype, 1)
    # Any processor that runs this does more, and one of today less, even while others compute.
    assert 1e8 < measured.flops_per_s < 1e13
    assert 1e7 < measured.bytes_per_s < 1e12


def test_the_highest_of_all_starts_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    found = iter([Ceilings(5.0, 2.0), Ceilings(3.0, 7.0), Ceilings(4.0, 4.0), Ceilings(1.0, 1.0), Ceilings(2.0, 2.0)])
    monkeypatch.setattr(ceilings, "measure", lambda *_: next(found))
    assert ceilings.highest("int8", 1, folder) == Ceilings(5.0, 2.0)
    assert ceilings.highest("int8", 1, folder) == Ceilings(5.0, 7.0)
    assert ceilings.highest("int8", 2, folder) == Ceilings(4.0, 4.0)  # other threads, other ceilings
    (file,) = folder.iterdir()
    assert len(json.loads(file.read_text())) == 2
    file.write_text("[damaged")
    assert ceilings.highest("int8", 1, folder) == Ceilings(1.0, 1.0)
    assert ceilings.highest("int8", 1, None) == Ceilings(2.0, 2.0)
