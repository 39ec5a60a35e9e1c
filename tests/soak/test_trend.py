from __future__ import annotations

import os

import pytest

from tests.soak.samples import Samples
from tests.soak.trend import Held, trend


def test_a_warm_up_is_no_growth_and_a_slope_after_it_is() -> None:
    warm = [float(min(n * 10, 300)) for n in range(120)]
    assert not trend("w", Held.MEMORY, warm).grows
    leaking = [300.0 + n * 0.2 for n in range(120)]
    assert trend("w", Held.MEMORY, leaking).grows


def test_a_process_of_hundreds_of_mib_may_differ_by_a_share() -> None:
    assert not trend("w", Held.MEMORY, [1000.0] * 60 + [1020.0] * 60).grows
    assert trend("w", Held.MEMORY, [1000.0] * 60 + [1040.0] * 60).grows


def test_one_descriptor_a_request_is_seen() -> None:
    assert trend("g", Held.DESCRIPTORS, [40.0 + n for n in range(120)]).grows
    assert not trend("g", Held.DESCRIPTORS, [40.0 + n % 5 for n in range(120)]).grows


def test_too_few_samples_tell_nothing() -> None:
    with pytest.raises(ValueError, match="3 samples tell no trend"):
        trend("w", Held.THREADS, [1.0] * 3)


def test_a_process_is_sampled() -> None:
    samples = Samples()
    kept = []
    for _ in range(4):
        kept.append(bytearray(os.urandom(1)) * (16 << 20))
        samples.take({"me": os.getpid()})
    memory = samples.series["me", Held.MEMORY]
    assert 30 < memory[3] - memory[1] < 40
    assert samples.series["me", Held.THREADS][0] >= 1
    with pytest.raises(OSError):
        samples.take({"gone": 2**22 + 1})
