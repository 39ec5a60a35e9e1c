from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvferry.api.directory.v1 import directory_pb2
from services.runtime.journal import BlockJournal, snapshot_events
from services.runtime.tier import Tier


def block(n: int) -> bytes:
    return n.to_bytes(16, "big")


def mended(max_hashes: int) -> BlockJournal:
    journal = BlockJournal(max_hashes)
    journal.mend()
    return journal


Follower = set[tuple[Tier, bytes]]


def replay(held: Follower, events: list[directory_pb2.BlockEvent]) -> None:
    for event in events:
        data = event.stored or event.removed
        tier = Tier.of(event.tier)
        assert tier is not None
        hashes = {(tier, data[i : i + 16]) for i in range(0, len(data), 16)}
        match event.WhichOneof("event"):
            case "stored":
                held |= hashes
            case "removed":
                held -= hashes
            case _:
                held.clear()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["stored", "removed", "cleared", "take", "break"]),
        st.lists(st.integers(0, 9).map(block), min_size=1, max_size=5),
        st.sampled_from(Tier),
    ),
    max_size=40,
)


@given(STEPS, st.integers(1, 12))
def test_a_follower_ends_up_with_the_cache(steps: list[tuple[str, list[bytes], Tier]], bound: int) -> None:
    """Whatever breaks when, snapshots and events together give what the cache holds."""
    journal, cache, follower = BlockJournal(bound), Follower(), Follower()

    def follow() -> None:
        if journal.broken:
            journal.mend()
            replay(follower, snapshot_events({t: sorted(h for u, h in cache if u is t) for t in Tier}, 4))
        replay(follower, journal.take(3))

    for kind, hashes, tier in steps:
        if kind == "stored":
            cache |= {(tier, hash_) for hash_ in hashes}
            journal.stored(hashes, tier)
        elif kind == "removed":
            cache -= {(tier, hash_) for hash_ in hashes}
            journal.removed(hashes, tier)
        elif kind == "cleared":
            cache.clear()
            journal.cleared()
        elif kind == "break":
            journal.break_()
        else:
            follow()
    follow()
    while events := journal.take(3):
        replay(follower, events)
    assert follower == cache


def test_events_between_mending_and_the_snapshot_are_kept() -> None:
    journal = BlockJournal(10)
    journal.mend()
    journal.removed([block(1)], Tier.DEVICE)
    follower = Follower()
    replay(follower, snapshot_events({Tier.DEVICE: [block(1)]}, 4))
    replay(follower, journal.take(10))
    assert follower == set()


def test_neighbours_of_a_kind_and_tier_merge_and_clearing_drops_what_was_before() -> None:
    journal = mended(10)
    journal.stored([block(1)], Tier.DEVICE)
    journal.stored([block(2)], Tier.DEVICE)
    journal.removed([block(1)], Tier.DEVICE)
    assert [event.WhichOneof("event") for event in journal.take(10)] == ["stored", "removed"]
    journal.stored([block(3)], Tier.DEVICE)
    journal.stored([block(3)], Tier.HOST)
    assert [event.tier for event in journal.take(10)] == [Tier.DEVICE.value, Tier.HOST.value]
    journal.stored([block(3)], Tier.DEVICE)
    journal.cleared()
    journal.stored([block(4)], Tier.DEVICE)
    cleared, stored = journal.take(10)
    assert (cleared.WhichOneof("event"), stored.stored) == ("cleared", block(4))


def test_too_much_breaks_it_and_keeps_nothing() -> None:
    journal = mended(3)
    journal.stored([block(1), block(2)], Tier.DEVICE)
    journal.stored([block(3)], Tier.DEVICE)
    assert not journal.broken
    journal.stored([block(4)], Tier.DEVICE)
    assert journal.broken
    journal.mend()
    assert journal.take(10) == []
