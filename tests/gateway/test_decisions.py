"""What the gateway remembers of its routes."""

from __future__ import annotations

from gateway.decisions import Decision, DecisionBook, Refusal


def refused(reason: str) -> Decision:
    return Decision(Refusal(reason, ()), made_s=0.0, view_age_s=0.0)


def test_all_attempts_of_the_last_requests() -> None:
    book = DecisionBook(max_requests=2)
    book.add("", "a", refused("a1"), first=True)
    book.add("", "b", refused("b1"), first=True)
    book.add("", "a", refused("a2"), first=False)
    assert [d.outcome.reason for d in book.of("", "a")] == ["a1", "a2"]
    book.add("", "c", refused("c1"), first=True)
    assert book.of("", "a") == ()
    assert len(book.of("", "b")) == len(book.of("", "c")) == 1


def test_an_id_that_is_used_again_begins_anew() -> None:
    book = DecisionBook(max_requests=2)
    for reason in ("old", "new"):
        book.add("", "a", refused(reason), first=True)
    assert [d.outcome.reason for d in book.of("", "a")] == ["new"]
    book.add("", "b", refused("b1"), first=True)
    book.add("", "a", refused("newest"), first=True)
    book.add("", "c", refused("c1"), first=True)
    assert book.of("", "b") == (), "the oldest goes, and that is not the one used again"
    assert len(book.of("", "a")) == 1
    assert book.of("", "other") == ()


def test_a_tenants_requests_are_its_own() -> None:
    book = DecisionBook()
    book.add("one", "a", refused("one's"), first=True)
    book.add("two", "a", refused("two's"), first=True)
    assert [d.outcome.reason for tenant in ("one", "two") for d in book.of(tenant, "a")] == ["one's", "two's"]
    assert book.of("", "a") == book.of("three", "a") == ()
