from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.pacing import Bounds, Size, Step, next_step

BOUNDS = Bounds(minimum=2, maximum=10, most_up=3, most_down=1)


@pytest.mark.parametrize(
    ("size", "target", "step"),
    [
        (Size(4, 4), 4, Step(4)),
        (Size(4, 4), 6, Step(6)),
        (Size(4, 4), 9, Step(7, "3 in one step")),
        (Size(4, 4), 1, Step(3, "1 in one step")),
        (Size(3, 3), 0, Step(2, "0 is outside of 2 to 10")),
        (Size(9, 9), 30, Step(10, "30 is outside of 2 to 10")),
        (Size(4, 5), 2, Step(4, "1 still drain")),
        (Size(4, 5), 5, Step(5)),  # nobody waits for who drains in order to grow
        (Size(4, 1), 3, Step(3)),  # nor in order to give up those that have not started
        (Size(0, 0), 0, Step(2, "0 is outside of 2 to 10")),
        (Size(30, 30), 12, Step(10, "12 is outside of 2 to 10")),
    ],
)
def test_steps(size: Size, target: int, step: Step) -> None:
    assert next_step(size, target, BOUNDS) == step


counts = st.integers(0, 40)


@given(counts, counts, counts, st.integers(0, 10), st.integers(0, 10), st.integers(1, 5), st.integers(1, 5))
def test_every_target_is_reached_in_steps_of_bounded_size(
    wanted: int, existing: int, target: int, minimum: int, more: int, up: int, down: int
) -> None:
    bounds = Bounds(minimum, minimum + more, up, down)
    goal = min(max(target, bounds.minimum), bounds.maximum)
    size = Size(wanted, existing)
    for _ in range(100):
        step = next_step(size, target, bounds)
        assert bounds.minimum <= step.count <= bounds.maximum
        if bounds.minimum <= size.wanted <= bounds.maximum:
            assert -down <= step.count - size.wanted <= up
            assert not (size.existing > size.wanted and step.count < size.wanted)
        if step.count == goal and size.wanted == goal:
            break
        size = Size(step.count, step.count)  # those that start and drain have done so
    assert size.wanted == goal


def test_bounds_that_make_no_sense_are_refused() -> None:
    for arguments in ((3, 2, 1, 1), (-1, 2, 1, 1), (1, 2, 0, 1), (1, 2, 1, 0)):
        with pytest.raises(ValueError):
            Bounds(*arguments)
