from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.engine.blocks import CacheChange
from services.runtime.tier import Tier
from services.worker.node import _publish


class Heard:
    """In the place of Membership."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def stored(self, hashes: Sequence[bytes], tier: Tier) -> None:
        self.calls.append(("stored", tier, hashes))

    def removed(self, hashes: Sequence[bytes], tier: Tier) -> None:
        self.calls.append(("removed", tier, hashes))


def test_changes_are_told_in_runs_of_a_kind_and_tier() -> None:
    heard: Any = Heard()
    _publish(heard, [])
    _publish(
        heard,
        [
            CacheChange(b"a", stored=True),
            CacheChange(b"b", stored=True),
            CacheChange(b"a", stored=True, tier=Tier.HOST),
            CacheChange(b"a", stored=False),
            CacheChange(b"c", stored=False),
            CacheChange(b"c", stored=True),
        ],
    )
    assert heard.calls == [
        ("stored", Tier.DEVICE, [b"a", b"b"]),
        ("stored", Tier.HOST, [b"a"]),
        ("removed", Tier.DEVICE, [b"a", b"c"]),
        ("stored", Tier.DEVICE, [b"c"]),
    ]
