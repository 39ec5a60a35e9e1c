"""Which writers nothing is taken from, and for how long."""

from __future__ import annotations

from services.decode.distrust import Distrust
from services.decode.tickets import WriterId

A, B, C = (WriterId(name, 1) for name in "abc")


def test_a_writer_is_distrusted_for_the_lifetime() -> None:
    distrust = Distrust(10.0)
    assert distrust.remaining_s(A, now_s=0) == 0
    distrust.add(A, now_s=5)
    assert distrust.remaining_s(A, now_s=7) == 8
    assert distrust.remaining_s(A, now_s=14.5) == 0.5
    assert distrust.remaining_s(A, now_s=15.25) == 0
    assert distrust.remaining_s(B, now_s=7) == 0


def test_more_damage_starts_the_time_anew() -> None:
    distrust = Distrust(10.0)
    distrust.add(A, now_s=0)
    distrust.add(A, now_s=6)
    assert distrust.remaining_s(A, now_s=11) == 5


def test_the_next_process_of_that_name_starts_clean() -> None:
    distrust = Distrust(10.0)
    distrust.add(A, now_s=0)
    assert distrust.remaining_s(WriterId("a", 2), now_s=1) == 0


def test_of_too_many_the_one_nearest_to_its_end_is_forgotten() -> None:
    distrust = Distrust(10.0, max_writers=2)
    for now_s, writer in enumerate((A, B, A, C)):
        distrust.add(writer, now_s=now_s)
    assert [distrust.remaining_s(writer, now_s=4) for writer in (A, B, C)] == [8, 0, 9]
