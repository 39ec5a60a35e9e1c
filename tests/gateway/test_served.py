from __future__ import annotations

from gateway.served import Served, ServedBook


def served(tenant: str, arrived_s: float) -> Served:
    return Served(tenant, arrived_s, 10, 0, 5, 0.1, 0.02, 0.01, 0.2)


def test_each_tenant_sees_its_own() -> None:
    book = ServedBook(0.0)
    for number, tenant in enumerate("abcab"):
        book.add(served(tenant, float(number)))
    assert [each.arrived_s for each in book.of("a")] == [0.0, 3.0]
    assert [each.arrived_s for each in book.of("c")] == [2.0]
    assert book.of("nobody") == []


def test_it_is_bounded_and_knows_since_when_it_is_whole() -> None:
    book = ServedBook(0.0, max_requests=3)
    for arrived_s in (5.0, 2.0, 7.0):
        book.add(served("", arrived_s))
    assert book.since_s == 0.0
    book.add(served("", 8.0))
    assert [each.arrived_s for each in book.of("")] == [2.0, 7.0, 8.0]
    assert book.since_s == 5.0
    book.add(served("", 9.0))  # what is forgotten arrived before what was before
    assert book.since_s == 5.0
