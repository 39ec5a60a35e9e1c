"""A request in every interleaving of its streams and their failures.  And machines that are broken on purpose, to see that
each fault of theirs is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.request import Action, CancelAttempt, Emit, Event, RequestMachine, State, Stream
from kvferry.api.common.v1 import common_pb2
from kvferry.errors import Error
from tests.exploration.search import Counterexample
from tests.gateway.exploration import Explorer, Setup


@pytest.mark.parametrize(
    ("setup", "at_least"),
    [
        pytest.param(Setup(), 60_000, id="two failures"),
        pytest.param(Setup(decoders=1, num_tokens=2, first_from_decode=True), 1_000, id="first tokens that wait"),
        pytest.param(
            Setup(decoders=1, faults=3, num_tokens=2, max_attempts=4), 25_000, id="one worker, three failures"
        ),
    ],
)
def test_each_token_leaves_once_everything_is_given_back_and_it_ends(setup: Setup, at_least: int) -> None:
    num_states = Explorer(setup).explore()
    print(f"{num_states} states")  # noqa: T201
    assert num_states >= at_least, "the exploration does not reach what it used to"


class SendsAgain(RequestMachine):
    """The first token comes by both streams."""

    def _on_token(self, stream: Stream, token: common_pb2.Token) -> list[Action]:
        return super()._on_token(stream, token) or [Emit(token)]


class HearsAttemptsGoneBy(RequestMachine):
    def on(self, event: Event) -> list[Action]:
        if self.state is State.ROUTING or self.state is State.ENDED or not hasattr(event, "attempt"):
            return super().on(event)
        return super().on(_with_attempt(event, self.attempt))


class LeavesItsWorkersAlone(RequestMachine):
    """Starts over, and the attempt before goes on."""

    def on(self, event: Event) -> list[Action]:
        return [a for a in super().on(event) if self.state is State.ENDED or not isinstance(a, CancelAttempt)]


class FailsWithoutACancel(RequestMachine):
    def _fail(self, error: Error) -> list[Action]:
        return super()._fail(error)[1:]


class NeverEnds(RequestMachine):
    """Its state does not say so."""

    def _finish_if_complete(self) -> list[Action]:
        actions = super()._finish_if_complete()
        if actions:
            self.state = State.DECODING
        return actions


class WaitsForTheWriterForEver(RequestMachine):
    def _finish_if_complete(self) -> list[Action]:
        self._prefill_lost = False
        return super()._finish_if_complete()


class ForgetsThatItWaits(RequestMachine):
    """For the figures."""

    def _finish_if_complete(self) -> list[Action]:
        self._prefill_lost = True
        return super()._finish_if_complete()


class CountsFromTheBeginning(RequestMachine):
    """The tokens of a later attempt."""

    def _on_token(self, stream: Stream, token: common_pb2.Token) -> list[Action]:
        self._num_sent_before = 0
        return super()._on_token(stream, token)


class StartsOverWhenAllIsThere(RequestMachine):
    def _end_of_answer(self) -> None:
        return None


class HoldsNothingAgainstAnybody(RequestMachine):
    def on(self, event: Event) -> list[Action]:
        actions = super().on(event)
        self._excluded = frozenset()
        return [_without_grudge(a) for a in actions]


class CountsWritersThatAreDistrusted(RequestMachine):
    """As attempts."""

    def on(self, event: Event) -> list[Action]:
        self._num_refused = 0
        self._max_attempts = min(self._max_attempts, 2)
        return super().on(event)


def _with_attempt(event: Any, attempt: int) -> Any:
    return event._replace(attempt=attempt) if isinstance(event, tuple) else replace(event, attempt=attempt)


def _without_grudge(action: Any) -> Any:
    return type(action)(frozenset(), action.num_sent) if hasattr(action, "excluded") else action


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (SendsAgain, "leaves behind"),
        (HearsAttemptsGoneBy, "it fails, though another attempt was left"),
        (LeavesItsWorkersAlone, "goes on at its workers"),
        (FailsWithoutACancel, "goes on at its workers"),
        (NeverEnds, "after the end comes"),
        (WaitsForTheWriterForEver, "from here the request never ends"),
        (ForgetsThatItWaits, "it finishes without the writer's figures"),
        (CountsFromTheBeginning, "it fails, though another attempt was left"),
        (StartsOverWhenAllIsThere, "it starts over behind 2 tokens"),
        (HoldsNothingAgainstAnybody, "is not held against"),
        (CountsWritersThatAreDistrusted, "it fails, though another attempt was left"),
    ],
)
def test_a_broken_machine_is_found(machine: type[RequestMachine], says: str) -> None:
    with pytest.raises(Counterexample) as found:
        Explorer(Setup(num_tokens=2, machine=machine)).explore()
    print(found.value)  # noqa: T201
    assert says in str(found.value).splitlines()[-1]
