"""Loads that share prefixes: chats that grow, and prompts behind a few system prompts.  Drawn by a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from services.planner.simulator.arrivals import Arrival
from services.planner.simulator.worker import VOCABULARY


def _tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(VOCABULARY) for _ in range(count))


class CommonPrompts:
    """System prompts of one length, the nth asked for ``1 / n ** skew`` as often as the first: evenly, or by Zipf's law."""

    def __init__(self, num_prompts: int, num_tokens: int, skew: float, random: Random) -> None:
        self._prompts = [_tokens(random, num_tokens) for _ in range(num_prompts)]
        self._weights = [(rank + 1) ** -skew for rank in range(num_prompts)]

    def draw(self, random: Random) -> tuple[int, ...]:
        return random.choices(self._prompts, self._weights)[0]


@dataclass(frozen=True, slots=True)
class Chats:
    """Conversations begin as a Poisson process; each turn brings the whole history and some more, after a pause.  With
    ``num_prompts`` each begins with one of so many system prompts, any as likely as the others."""

    num_chats: int = 40
    num_turns: int = 6
    first_tokens: int = 300
    turn_tokens: int = 80
    output_tokens: int = 40
    think_s: float = 8.0
    num_prompts: int = 0
    prompt_tokens: int = 800

    def arrivals(self, rate: float, seed: int) -> Iterator[Arrival]:
        """``rate``: requests/s, roughly: conversations/s times turns."""
        random, at_s = Random(seed), 0.0
        common = CommonPrompts(self.num_prompts, self.prompt_tokens, 0.0, Random(f"{seed}/common"))
        for chat in range(self.num_chats):
            at_s += random.expovariate(rate / self.num_turns)
            own = Random(f"{seed}/{chat}")
            first = _tokens(own, round(self.first_tokens * own.uniform(0.5, 1.5)))
            if self.num_prompts:
                first = (*common.draw(own), *first)
            yield self._turn(own, f"c{chat}", 0, at_s, first)

    def _turn(self, own: Random, chat: str, turn: int, at_s: float, prompt: tuple[int, ...]) -> Arrival:
        def then(ended_s: float, answer: list[int]) -> Arrival | None:
            if turn + 1 == self.num_turns:
                return None
            more = _tokens(own, round(self.turn_tokens * own.uniform(0.5, 1.5)))
            next_s = ended_s + own.expovariate(1 / self.think_s)
            return self._turn(own, chat, turn + 1, next_s, (*prompt, *answer, *more))

        return Arrival(f"{chat}t{turn}", at_s, prompt, self.output_tokens, then)


@dataclass(frozen=True, slots=True)
class SystemPrompts:
    """Each request has one of several system prompts, by Zipf's law, and its own question."""

    num_requests: int = 240
    num_prompts: int = 48
    prompt_tokens: int = 800
    question_tokens: int = 60
    output_tokens: int = 40

    def arrivals(self, rate: float, seed: int) -> Iterator[Arrival]:
        random, at_s = Random(seed), 0.0
        common = CommonPrompts(self.num_prompts, self.prompt_tokens, 1.0, random)
        for number in range(self.num_requests):
            at_s += random.expovariate(rate)
            question = _tokens(random, round(self.question_tokens * random.uniform(0.5, 1.5)))
            yield Arrival(f"r{number}", at_s, (*common.draw(random), *question), self.output_tokens)


Load = Callable[[float, int], Iterator[Arrival]]
LOADS: dict[str, Load] = {
    "chats of 3 turns": Chats(num_chats=80, num_turns=3).arrivals,
    "chats of 6 turns": Chats().arrivals,
    # The 46 or so that are asked for have 2300 blocks of 16 tokens, more than two workers' pools of 1024.
    "chats behind 64 system prompts": Chats(num_chats=80, num_turns=3, first_tokens=60, num_prompts=64).arrivals,
    "system prompts": SystemPrompts().arrivals,
}
