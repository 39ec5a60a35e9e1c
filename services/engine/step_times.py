"""How long a step takes against how many sequences decode in it, or prompt tokens are computed, as measured.  Pure."""

from __future__ import annotations

# What a step weighs when so many more have been seen.
HALF_LIFE_STEPS = 200
_KEEP = 0.5 ** (1 / HALF_LIFE_STEPS)
# From as many on the line is worth comparing the next step with.
NUM_EXPECTING = 20


class StepTimes:
    """A line through the steps observed, least squares, older steps weighing less.  Neither of its numbers is negative; as
    long as all steps had the same batch, all their time counts as the base."""

    def __init__(self) -> None:
        # Sums of weight, batch, time, batch squared, batch times time.
        self._w = self._b = self._t = self._bb = self._bt = 0.0

    def observe(self, num_sequences: int, elapsed_s: float) -> None:
        self._w = self._w * _KEEP + 1
        self._b = self._b * _KEEP + num_sequences
        self._t = self._t * _KEEP + elapsed_s
        self._bb = self._bb * _KEEP + num_sequences**2
        self._bt = self._bt * _KEEP + num_sequences * elapsed_s

    def expected_s(self, num_sequences: int) -> float | None:
        """By the steps before; None before there were some."""
        base_s, per_sequence_s = self.line()
        return base_s + per_sequence_s * num_sequences if self._w >= NUM_EXPECTING else None

    def line(self) -> tuple[float, float]:
        """Seconds of a step without sequences, and for each sequence; zeros before the first step."""
        if self._w == 0:
            return 0.0, 0.0
        spread = self._w * self._bb - self._b**2
        # What rounding leaves where there was one batch size only.
        if spread <= 1e-6 * self._w * self._bb:
            return self._t / self._w, 0.0
        slope = (self._w * self._bt - self._b * self._t) / spread
        base = (self._t - slope * self._b) / self._w
        if slope < 0:
            return self._t / self._w, 0.0
        if base < 0:
            return 0.0, self._bt / self._bb
        return base, slope
