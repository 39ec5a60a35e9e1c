"""What is asked, by whom, and what came of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry import CancelledError, Client, Error

TIMEOUT_S = 90.0
MAX_ATTEMPTS = 6
_WORDS = (
    "river", "stone", "cloud", "ferry", "lantern", "harbour", "winter", "music", "number", "paper", "garden", "engine",
    "silver", "morning", "window",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A request whose answer is determined."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int

    def ask(self, client: Client) -> Asking:
        return Asking(self, client)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the client saw; ``error`` is what the SDK raised in the end, ``left`` that it went away of its own will."""

    case: Case
    began_s: float
    ended_s: float
    token_ids: tuple[int, ...]
    text: str
    completed: bool
    left: bool = False
    error: Exception | None = None
    num_retries: int = 0


class Asking:
    """One request; ``run`` is for one thread, and blocks until it has ended."""

    def __init__(self, case: Case, client: Client) -> None:
        self.case = case
        self.began_s = time.monotonic()
        self._client = client

    def run(self, leave_after: int | None = None) -> Outcome:
        """``leave_after`` so many tokens the client disconnects."""
        case, num_retries, left, error = self.case, 0, False, None
        stream = self._client.generate(
            case.prompt, max_tokens=case.max_tokens, temperature=case.temperature, seed=case.seed, ignore_eos=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip
        try:
            with stream:
                for _ in stream:
                    if leave_after is not None and len(stream.tokens) >= leave_after:
                        left = True
                        break
        except CancelledError as e:
            error = None if left else e
        except Error as e:
            error = e
        except Exception as e:  # the SDK promises that there are no others
            error = e
        if stream.timeline is not None:
            num_retries = stream.timeline.num_retries
        return Outcome(
            case, self.began_s, time.monotonic(), tuple(t.id for t in stream.tokens), stream.text,
            completed=stream.finish_reason is not None, left=left, error=error, num_retries=num_retries,
        )  # fmt: skip


def cases(seed: int, count: int) -> list[Case]:
    """Short and long prompts, some with a beginning in common, greedy and seeded."""
    random_ = random.Random(f"cases {seed}")
    shared = _prose(random_, 150)
    found = []
    for index in range(count):
        found.append(_case(random_, beginning=f"{shared} " if index % 3 == 0 else ""))
    return found


def _case(random_: random.Random, beginning: str = "") -> Case:
    prompt = beginning + _prose(random_, random_.choice((4, 12, 60, 250)))
    return Case(prompt, random_.choice((2, 12, 32, 80)), random_.choice((0.0, 0.8)), random_.randrange(1 << 31))


class Load:
    """``num_streams`` clients that ask one thing after the other, each by a seed of its own, until told to stop.

    ``fresh`` is the share of requests whose prompt nobody has asked before."""

    def __init__(self, seed: int, address: str, asked: Sequence[Case], num_streams: int, fresh: float = 0.0) -> None:
        self.outcomes: list[Outcome] = []
        self._asked = asked
        self._fresh = fresh
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._asking: dict[int, Asking] = {}
        first, _, second = address.partition(",")
        addresses = (address, f"{second},{first}") if second else (address,)  # both gateways have their share
        self._threads = [
            threading.Thread(target=self._run, args=(seed, number, addresses[number % len(addresses)]), daemon=True)
            for number in range(num_streams)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, within_s: float) -> list[Asking]:
        """Lets what has been asked end; what has not ended in time."""
        self._stopping.set()
        end_s = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        with self._lock:
            return list(self._asking.values())

    def _run(self, seed: int, number: int, address: str) -> None:
        random_ = random.Random(f"load {seed} {number}")
        while not self._stopping.is_set():
            with Client(address, max_attempts=MAX_ATTEMPTS) as client:
                for _ in range(20):
                    if self._stopping.wait(random_.expovariate(4.0)):
                        return
                    case = self._choose(random_)
                    leave_after = random_.randint(1, case.max_tokens) if random_.random() < 0.15 else None
                    asking = case.ask(client)
                    with self._lock:
                        self._asking[number] = asking
                    outcome = asking.run(leave_after)
                    with self._lock:
                        del self._asking[number]
                        self.outcomes.append(outcome)

    def _choose(self, random_: random.Random) -> Case:
        if self._fresh and random_.random() < self._fresh:
            return _case(random_)
        return random_.choice(self._asked)


def _prose(random_: random.Random, num_words: int) -> str:
    return " ".join(random_.choice(_WORDS) for _ in range(num_words))
