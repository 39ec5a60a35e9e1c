"""When what a step computed is in memory.  No torch: workers pass it on."""

from __future__ import annotations

from typing import Protocol


class Ready(Protocol):
    """Of a step that was started and may still be running on a device.  Any thread may ask."""

    def done(self) -> bool:
        """Whether it is in memory by now; stays so.  Does not block.  Raises what the device failed with."""

    def wait(self) -> None:
        """Blocks until it is."""
