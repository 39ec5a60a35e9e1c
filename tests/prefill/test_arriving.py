from __future__ import annotations

from services.prefill.arriving import Arriving
from transport.sockets import Connection

A, B, C = (Connection(name, "there") for name in "abc")


def test_it_has_ended_when_each_connection_of_the_moment_has_been_empty_once() -> None:
    now = {A, B}
    arriving = Arriving(lambda: set(now))
    assert not arriving.has_ended()
    now.discard(A)
    assert not arriving.has_ended()
    now |= {A, C}  # of bytes that were sent later
    now.discard(B)
    assert arriving.has_ended()


def test_an_owner_is_refused_once_in_any_case() -> None:
    arriving = Arriving(set)
    assert [arriving.has_ended(), arriving.has_ended()] == [False, True]
