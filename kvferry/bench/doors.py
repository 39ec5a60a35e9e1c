"""Ways into a system that is put under load."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from kvferry.aio import AsyncClient
from kvferry.bench.workload import Prompt
from kvferry.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Target:
    """The model behind a door.  ``context_length`` is None where the other side does not tell it."""

    name: str
    context_length: int | None
    vocab_size: int


class Door(Protocol):
    async def target(self) -> Target:
        """Raises kvferry.Error."""
        ...

    def stream(self, prompt: Prompt, num_output_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        """How many tokens came, each time some did; ends with the answer.  Raises kvferry.Error."""
        ...


class GrpcDoor:
    """Owns nothing: ``client`` is the caller's.  It should not try again by itself, or refusals are not seen."""

    def __init__(self, client: AsyncClient, model: str = "") -> None:
        self._client = client
        self._model = model

    async def target(self) -> Target:
        for model in await self._client.models():
            if self._model in ("", model.name):
                return Target(model.name, model.context_length, model.vocab_size)
        raise NotFoundError(f"the gateway does not serve {self._model!r}", reason="MODEL_NOT_FOUND")

    async def stream(self, prompt: Prompt, num_output_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        asked = self._client.generate(
            prompt, model=self._model, max_tokens=num_output_tokens, ignore_eos=True, temperature=0, timeout=timeout_s
        )
        async with asked as answer:
            async for chunk in answer:
                if chunk.tokens:
                    yield len(chunk.tokens)
