"""Answers in OpenAI's two shapes, as dicts ready for JSON.  No pydantic here: this is the path of every token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.http.encoding import plain
from gateway.http.front_door import Vocabulary
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2

Tokens = Sequence[common_pb2.Token]

_FINISH_REASON = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}
# OpenAI's stand-in for a probability of zero, whose logarithm JSON cannot hold.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer repeats.  ``id`` comes without the prefix of its shape; ``fingerprint`` is the
    model's revision: with the same seed it promises the same text."""

    id: str
    created_s: int
    model: str
    fingerprint: str


class Shape(Protocol):
    """One answer's shape.  ``delta`` and ``whole`` count the tokens they are given, so each sees a token once; tokens
    matter only where log-probabilities were asked for."""

    def opening(self) -> dict[str, Any] | None:
        """What a stream begins with, or None."""
        ...

    def delta(self, text: str, tokens: Tokens) -> dict[str, Any]: ...

    def closing(self, reason: common_pb2.FinishReason.ValueType) -> dict[str, Any]: ...

    def usage(self, usage: inference_pb2.Usage) -> dict[str, Any]:
        """The event after the last choice, with the counts alone."""
        ...

    def whole(self, text: str, tokens: Tokens, finished: inference_pb2.Finished) -> dict[str, Any]: ...


class ChatShape:
    def __init__(self, head: Head, vocabulary: Vocabulary, *, with_logprobs: bool) -> None:
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs
        self._whole = _envelope(head, "chatcmpl-", "chat.completion")
        self._chunk = _envelope(head, "chatcmpl-", "chat.completion.chunk")

    def opening(self) -> dict[str, Any]:
        return self._event({"role": "assistant", "content": ""}, None, None)

    def delta(self, text: str, tokens: Tokens) -> dict[str, Any]:
        return self._event({"content": text}, self._logprobs(tokens), None)

    def closing(self, reason: common_pb2.FinishReason.ValueType) -> dict[str, Any]:
        return self._event({}, None, _FINISH_REASON[reason])

    def usage(self, usage: inference_pb2.Usage) -> dict[str, Any]:
        return {**self._chunk, "choices": [], "usage": usage_content(usage)}

    def whole(self, text: str, tokens: Tokens, finished: inference_pb2.Finished) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": _FINISH_REASON[finished.reason],
        }
        return {**self._whole, "choices": [choice], "usage": usage_content(finished.usage)}

    def _event(self, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._chunk, "choices": [choice]}

    def _logprobs(self, tokens: Tokens) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._shown(token.id, token.logprob),
                "top_logprobs": [self._shown(top.token_id, top.logprob) for top in token.top_logprobs],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _shown(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._vocabulary.text(token_id),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(self._vocabulary.bytes(token_id)),
        }


class CompletionShape:
    def __init__(self, head: Head, vocabulary: Vocabulary, *, with_logprobs: bool) -> None:
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs
        self._envelope = _envelope(head, "cmpl-", "text_completion")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def opening(self) -> None:
        return None

    def delta(self, text: str, tokens: Tokens) -> dict[str, Any]:
        return self._event(text, self._logprobs(tokens), None)

    def closing(self, reason: common_pb2.FinishReason.ValueType) -> dict[str, Any]:
        return self._event("", None, _FINISH_REASON[reason])

    def usage(self, usage: inference_pb2.Usage) -> dict[str, Any]:
        return {**self._envelope, "choices": [], "usage": usage_content(usage)}

    def whole(self, text: str, tokens: Tokens, finished: inference_pb2.Finished) -> dict[str, Any]:
        content = self._event(text, self._logprobs(tokens), _FINISH_REASON[finished.reason])
        content["usage"] = usage_content(finished.usage)
        return content

    def _event(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._envelope, "choices": [choice]}

    def _logprobs(self, tokens: Tokens) -> dict[str, Any] | None:
        """``text_offset`` counts characters of the answer; a token that only completes a character has the offset at
        which that character stands."""
        if not self._with_logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._vocabulary.bytes(token.id)))
        return {
            "tokens": [self._vocabulary.text(token.id) for token in tokens],
            "token_logprobs": [max(token.logprob, _LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: common_pb2.Token) -> dict[str, float]:
        """The likeliest by their text, and the drawn token in any case.  Where two look alike the likelier counts."""
        top: dict[str, float] = {}
        for token_id, logprob in (*_pairs(token.top_logprobs), (token.id, token.logprob)):
            top.setdefault(self._vocabulary.text(token_id), max(logprob, _LEAST_LOGPROB))
        return top


def usage_content(usage: inference_pb2.Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def timeline_content(timeline: inference_pb2.Timeline) -> dict[str, Any]:
    """The extension that x-kvferry-timeline asks for, under the field ``kvferry`` of the answer's last part."""
    return {"timeline": plain(timeline)}


def _envelope(head: Head, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": prefix + head.id,
        "object": kind,
        "created": head.created_s,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


def _pairs(top: Iterable[common_pb2.TokenLogprob]) -> Iterable[tuple[int, float]]:
    return ((each.token_id, each.logprob) for each in top)
