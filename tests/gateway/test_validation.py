"""How much a client may ask, whichever door it comes by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.tenants import EVERYBODY
from gateway.validation import (
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    NORMALIZATION_FACTOR,
    Validator,
)
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from kvferry.errors import InvalidRequestError
from services.engine.model_files import ModelFiles
from services.runtime.tracing import MAX_REQUEST_ID_LENGTH

CONTEXT = 64


@dataclass(slots=True)
class Watched:
    """The model's tokenizer, and what it was given to read."""

    tokenizer: Any
    texts: list[str] = field(default_factory=list)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        self.texts.append(text)
        ids: list[int] = self.tokenizer.encode(text, add_special=add_special)
        return ids

    @property
    def longest_token_nbytes(self) -> int:
        nbytes: int = self.tokenizer.longest_token_nbytes
        return nbytes


@pytest.fixture(scope="module")
def files(smollm2: ModelFiles) -> ModelFiles:
    """The real model's, with a context that is soon full."""
    return replace(smollm2, config=replace(smollm2.config, context_length=CONTEXT))


def asking(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**fields)


async def refused(validator: Validator, request: inference_pb2.GenerateRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        await validator.to_job(request, EVERYBODY)
    return caught.value


def tokens(count: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=[5] * count)


async def test_a_prompt_leaves_room_for_a_token_of_its_answer(files: ModelFiles) -> None:
    validator = Validator.for_model(files)
    job = await validator.to_job(asking(token_ids=tokens(CONTEXT - 1)), EVERYBODY)
    assert (len(job.prompt), job.sampling.max_tokens) == (CONTEXT - 1, 1)
    error = await refused(
        validator, asking(token_ids=tokens(CONTEXT), sampling=common_pb2.SamplingParams(max_tokens=1))
    )
    assert (error.reason, error.metadata["field"]) == ("PROMPT_TOO_LONG", "prompt")
    assert f"has {CONTEXT} tokens; the model's context holds {CONTEXT}" in error.message


async def test_a_prompt_that_is_text_is_counted_in_tokens(files: ModelFiles) -> None:
    validator = Validator.for_model(files)
    messages = [inference_pb2.ChatMessage(role="user", content="word " * CONTEXT)]
    for request in (asking(text="word " * CONTEXT), asking(chat=inference_pb2.Chat(messages=messages))):
        assert (await refused(validator, request)).reason == "PROMPT_TOO_LONG"


async def test_a_text_that_no_context_holds_is_not_even_tokenized(files: ModelFiles) -> None:
    watched = Watched(files.tokenizer)
    validator = Validator.for_model(replace(files, tokenizer=watched))  # type: ignore[arg-type]
    longest = CONTEXT * watched.longest_token_nbytes * NORMALIZATION_FACTOR
    assert validator.max_text_length == longest
    for text in ("x" * (longest + 1), "x" * longest):
        error = await refused(validator, asking(text=text))
        assert (error.reason, error.metadata["field"]) == ("PROMPT_TOO_LONG", "prompt")
    assert [len(text) for text in watched.texts] == [longest], "the shorter one might have fitted"
    with pytest.raises(InvalidRequestError, match="characters"):
        await validator.tokenize("x" * (longest + 1))


@pytest.mark.parametrize(
    ("fields", "at_most", "named"),
    [
        ("stop", MAX_STOP_STRINGS, "stop"),
        ("stop length", MAX_STOP_LENGTH, "stop"),
        ("stop ids", MAX_STOP_TOKENS, "stop_token_ids"),
        ("logprobs", MAX_LOGPROBS, "num_logprobs"),
        ("request id", MAX_REQUEST_ID_LENGTH, "request_id"),
        ("answer", CONTEXT - 1, "max_tokens"),
    ],
)
async def test_what_comes_with_it_is_bounded_too(files: ModelFiles, fields: str, at_most: int, named: str) -> None:
    validator = Validator.for_model(files)

    def of(count: int) -> inference_pb2.GenerateRequest:
        request = asking(token_ids=tokens(1))
        match fields:
            case "stop":
                request.stop.extend(["x"] * count)
            case "stop length":
                request.stop.append("x" * count)
            case "stop ids":
                request.sampling.stop_token_ids.extend(range(count))
            case "logprobs":
                request.sampling.num_logprobs = count
            case "request id":
                request.request_id = "x" * count
            case "answer":
                request.sampling.max_tokens = count
        return request

    assert await validator.to_job(of(at_most), EVERYBODY)
    error = await refused(validator, of(at_most + 1))
    assert error.metadata["field"] == named
