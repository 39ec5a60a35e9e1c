"""What has arrived of one answer; both kinds of stream are one."""

from __future__ import annotations

from kvferry import _convert, errors
from kvferry.api.inference.v1 import inference_pb2
from kvferry.types import Chunk, Completion, FinishReason, Timeline, Token, Usage


class Answer:
    """Grows while its stream is read.  ``text`` and ``tokens`` hold what has arrived so far; ``request_id``, ``model``,
    ``num_prompt_tokens`` and ``seed`` are None until the answer has begun, ``finish_reason``, ``usage`` and
    ``timeline`` until it has ended."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._tokens: list[Token] = []
        self.request_id: str | None = None
        self.model: str | None = None
        self.num_prompt_tokens: int | None = None
        self.seed: int | None = None
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.timeline: Timeline | None = None

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(self._tokens)

    def _take(self, response: inference_pb2.GenerateResponse) -> Chunk | None:
        """Adds one event; events that this version does not know are passed over."""
        match response.WhichOneof("event"):
            case "started":
                self.request_id = response.started.request_id
                self.model = response.started.model
                self.num_prompt_tokens = response.started.num_prompt_tokens
                self.seed = response.started.seed
            case "chunk":
                chunk = _convert.chunk(response.chunk)
                self._texts.append(chunk.text)
                self._tokens.extend(chunk.tokens)
                return chunk
            case "finished":
                self.finish_reason = _convert.finish_reason(response.finished.reason)
                self.usage = _convert.usage(response.finished.usage)
                self.timeline = _convert.timeline(response.finished.timeline)
        return None

    def _check_complete(self) -> None:
        """Raises InternalError when the stream ended without its Finished event."""
        if self.finish_reason is None:
            raise errors.InternalError("the answer broke off: the server ended the stream without its Finished event")

    def _completion(self) -> Completion:
        self._check_complete()
        assert self.finish_reason is not None
        assert self.usage is not None
        assert self.timeline is not None
        return Completion(
            text=self.text,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            usage=self.usage,
            timeline=self.timeline,
            request_id=self.request_id or "",
            model=self.model or "",
            seed=self.seed or 0,
        )
