"""Notes what refusals say besides their reason."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from kvferry.bench.doors import Door, Target
from kvferry.bench.workload import Prompt
from kvferry.errors import OverloadedError


class NotingDoor:
    """``hints_s``: each refusal's, None where it had none."""

    def __init__(self, door: Door) -> None:
        self.hints_s: list[float | None] = []
        self._door = door

    async def target(self) -> Target:
        return await self._door.target()

    async def stream(self, prompt: Prompt, num_output_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        try:
            async with aclosing(self._door.stream(prompt, num_output_tokens, timeout_s)) as answer:
                async for num_tokens in answer:
                    yield num_tokens
        except OverloadedError as error:
            self.hints_s.append(error.retry_after_s)
            raise
