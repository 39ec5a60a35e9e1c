from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.text import TextStream

# Bytes that make all kinds of whole, broken and overlong characters likely, and text that stop strings can hit.
WHOLE = [b"a", b"b", b"ab", b"aab", "é".encode(), "日".encode(), "🦆".encode(), b""]
BROKEN = [b"\xc3", b"\xe6\x97", b"\xf0\x9f\xa6", b"\x86", b"\xed\xa0\x80", b"\xe0\x80", b"\xf4\x90\x80\x80", b"\xff"]
PIECES = st.sampled_from([*WHOLE, *BROKEN])
DATA = st.lists(PIECES | st.binary(max_size=3), max_size=12).map(b"".join)
STOPS = st.lists(st.text("ab日🦆é\ufffd", min_size=1, max_size=4), max_size=4)


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The definition: before the stop string that is complete first, of those the longest."""
    hits = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    return (text[: min(hits)[1]], True) if hits else (text, False)


def split(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(i % (len(data) + 1) for i in at), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def play(tokens: list[bytes], stop: list[str] | None = None) -> tuple[list[str], TextStream]:
    """What feeding each token and the flush returned."""
    stream = TextStream(tokens.__getitem__, stop or [])
    texts = [stream.feed(i) for i in range(len(tokens))]
    return [*texts, stream.flush()], stream


@given(DATA, st.lists(st.integers(0, 1000), max_size=8), STOPS)
def test_any_split_gives_the_text_before_the_first_stop_string(data: bytes, at: list[int], stop: list[str]) -> None:
    texts, stream = play(split(data, at), stop)
    assert ("".join(texts), stream.stopped) == cut(data.decode(errors="replace"), stop)


@given(DATA, st.lists(st.integers(0, 1000), max_size=8), STOPS)
def test_what_is_emitted_stands_whatever_comes_next(data: bytes, at: list[int], stop: list[str]) -> None:
    tokens = split(data, at)
    stream = TextStream(tokens.__getitem__, stop)
    emitted = ""
    for i in range(len(tokens)):
        emitted += stream.feed(i)
        so_far = b"".join(tokens[: i + 1])
        for more in (b"", b"a", b"\x80", "日".encode(), *(s.encode() for s in stop)):
            assert cut((so_far + more).decode(errors="replace"), stop)[0].startswith(emitted)


def test_whole_characters_leave_at_once() -> None:
    assert play([b"a", "é".encode(), b"\xe6\x97", b"\xa5x", b"z"])[0] == ["a", "é", "", "日x", "z", ""]


def test_a_broken_character_is_replaced_only_when_nothing_can_complete_it() -> None:
    assert play([b"\xf0\x9f", b"\xa6", b"a"])[0] == ["", "", "\ufffda", ""]
    assert play([b"\xf0\x9f"])[0] == ["", "\ufffd"]


def test_a_tail_that_may_be_a_stop_string_waits() -> None:
    texts, stream = play([b"one#", b"#", b"two###", b"end"], ["###"])
    assert texts == ["one", "", "##two", "", ""]
    assert stream.stopped


def test_a_held_tail_is_emitted_at_the_end() -> None:
    texts, stream = play([b"one##"], ["###"])
    assert texts == ["one", "##"]
    assert not stream.stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("xabcy", ["bc", "abc"], "x"),  # complete together: the longest
        ("xabcde", ["abcde", "bcd"], "xa"),  # the one complete first
        ("aaab", ["aab"], "a"),  # a stop string that overlaps itself
        ("ababac", ["abac", "zz"], "ab"),
        ("日本🦆語", ["本🦆"], "日"),
        ("ab", ["ab"], ""),
    ],
)
def test_which_stop_string_counts(text: str, stop: list[str], expected: str) -> None:
    for tokens in ([text.encode()], [bytes([b]) for b in text.encode()]):
        texts, stream = play(tokens, stop)
        assert ("".join(texts), stream.stopped) == (expected, True)


def test_tokens_after_the_hit_yield_nothing() -> None:
    texts, _ = play([b"a#b", b"more"], ["#"])
    assert texts == ["a", "", ""]


def test_huge_stop_strings_and_long_near_misses_cost_linear_time() -> None:
    num_chars = 50_000
    stream = TextStream(lambda _: b"a" * 10, ["a" * 2_000_000, "a" * (num_chars - 1) + "b", "b" * 2_000_000])
    began_s = time.perf_counter()
    assert all(stream.feed(0) == "" for _ in range(num_chars // 10))
    assert stream.flush() == "a" * num_chars
    # Quadratic, this takes minutes.
    assert time.perf_counter() - began_s < 10
