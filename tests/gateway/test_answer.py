"""One request's answer: what the metrics learn of it, and when it wants no more."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from gateway.answer import TELL_INTERVAL_S, Answer, Clock
from gateway.text import TextStream
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Counts:
    """Since it was made."""

    def __init__(self) -> None:
        self._before = self._now()

    @property
    def since(self) -> list[float]:
        """Tokens, gaps, gaps of at most 0.1 s, seconds of gaps."""
        return [now - before for now, before in zip(self._now(), self._before, strict=True)]

    @staticmethod
    def _now() -> list[float]:
        name = "kvferry_itl_seconds"
        return [
            sample("kvferry_output_tokens_total"), sample(f"{name}_count"), sample(f"{name}_bucket", le="0.1"),
            sample(f"{name}_sum"),
        ]  # fmt: skip


def test_the_metrics_hear_of_each_token_and_gap_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("gateway.answer.time.monotonic", lambda: now_s)
    clock, counts = Clock(), Counts()
    for gap_s, num_tokens in ((0.0, 1), (0.1, 1), (0.3, 2)):
        now_s += gap_s
        clock.tokens_left(num_tokens)
    assert counts.since == [0, 0, 0, 0]
    now_s += TELL_INTERVAL_S
    clock.tokens_left(1)
    assert counts.since == pytest.approx([5, 4, 2, 0.4 + TELL_INTERVAL_S]), "one of them was 0: two left together"
    clock.tell()
    now_s += 0.2
    clock.tokens_left(1)
    clock.tell()
    assert counts.since == pytest.approx([6, 5, 2, 0.6 + TELL_INTERVAL_S])
    assert clock.num_left == 6


class Outlet:
    def __init__(self) -> None:
        self.sent: list[inference_pb2.GenerateResponse] = []
        self.takes = True

    def send(self, response: inference_pb2.GenerateResponse) -> bool:
        self.sent.append(response)
        return self.takes

    async def drained(self) -> None:
        self.takes = True


def answering(stop: tuple[str, ...] = (), silent: frozenset[int] = frozenset()) -> tuple[Answer, Outlet, Clock]:
    outlet, clock = Outlet(), Clock()
    text = TextStream(lambda id_: bytes([id_]), stop)
    return Answer(inference_pb2.Started(request_id="r"), text, silent, clock, outlet), outlet, clock


def tokens(text: str) -> list[common_pb2.Token]:
    return [common_pb2.Token(index=index, id=id_) for index, id_ in enumerate(text.encode())]


async def test_it_has_room_as_its_client_has() -> None:
    answer, outlet, clock = answering()
    assert answer.put(tokens("ab"))
    outlet.takes = False
    assert not answer.put(tokens("c"))
    assert await answer.room()
    assert answer.put(tokens("d"))
    assert [response.WhichOneof("event") for response in outlet.sent] == ["started", "chunk", "chunk", "chunk"]
    assert [response.chunk.text for response in outlet.sent[1:]] == ["ab", "c", "d"]
    assert [len(response.chunk.tokens) for response in outlet.sent[1:]] == [2, 1, 1]
    assert clock.num_left == 4


async def test_after_a_stop_string_it_wants_no_more_and_counts_no_more() -> None:
    answer, outlet, clock = answering(stop=("c",))
    assert not answer.put(tokens("abcde"))
    assert not await answer.room()
    assert outlet.sent[-1].chunk.text == "ab"
    assert len(outlet.sent[-1].chunk.tokens) == clock.num_left == 3


async def test_tokens_that_say_nothing_are_sent_without_text() -> None:
    answer, outlet, _ = answering(silent=frozenset(b"b"))
    assert answer.put(tokens("abc"))
    assert outlet.sent[-1].chunk.text == "ac"
    assert len(outlet.sent[-1].chunk.tokens) == 3
