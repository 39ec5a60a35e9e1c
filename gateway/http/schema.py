"""What clients may ask, checked strictly: OpenAI's field names, the ranges of kvferry.api.common.v1.SamplingParams.

``user``, ``metadata`` and ``store`` are accepted and change nothing, as OpenAI documents them: they label a request for
the account's own bookkeeping.  ``n`` can only be 1, ``echo`` only false, and the penalties only 0, which is what clients
send that always send them.  ``top_k``, ``ignore_eos``, ``min_tokens`` and ``continuous_usage_stats`` are vLLM's, which
load tools send; ``speculate`` and ``priority`` are ours.  Any other field is refused rather
than ignored.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from kvferry.errors import InvalidRequestError

# OpenAI's own default for completions; a chat's answer may fill the context.
DEFAULT_COMPLETION_TOKENS = 16


def _only(value: float | bool) -> AfterValidator:
    shown = json.dumps(value)

    def check(given: float | bool) -> float | bool:
        if given != value:
            raise PydanticCustomError("only", "Input should be {only}, the only value served", {"only": shown})
        return given

    return AfterValidator(check)


def _choose(text: str, texts: str, others: str) -> Callable[[Any], str | None]:
    """Picks the branch of a union by the JSON at hand, so that errors are about the branch that was meant."""

    def kind(value: Any) -> str | None:
        if isinstance(value, str):
            return text
        if isinstance(value, list):
            return texts if value and isinstance(value[0], str) else others
        return None

    return kind


_MAX_INT32 = 2**31 - 1
_NonEmpty = Annotated[str, Field(min_length=1)]
_NumTokens = Annotated[int, Field(ge=1, le=_MAX_INT32)]
_TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]

# Branches of unions.  The brackets tell them from field names in the places of pydantic's errors.
_TEXT, _TEXTS, _TOKENS, _PARTS = "<text>", "<texts>", "<tokens>", "<parts>"
_BRANCHES = frozenset({_TEXT, _TEXTS, _TOKENS, _PARTS})

Stop = Annotated[
    Annotated[_NonEmpty, Tag(_TEXT)] | Annotated[list[_NonEmpty], Field(max_length=16, fail_fast=True), Tag(_TEXTS)],
    Discriminator(
        _choose(_TEXT, _TEXTS, _TEXTS),
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or an array of strings",
    ),
]
Prompt = Annotated[
    Annotated[_NonEmpty, Tag(_TEXT)]
    | Annotated[list[_NonEmpty], Field(max_length=1, fail_fast=True), Tag(_TEXTS)]
    | Annotated[list[_TokenId], Field(min_length=1, fail_fast=True), Tag(_TOKENS)],
    Discriminator(
        _choose(_TEXT, _TEXTS, _TOKENS),
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, an array of one string, or an array of token ids",
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag(_PARTS)],
    Discriminator(
        _choose(_TEXT, _PARTS, _PARTS),
        custom_error_type="content_type",
        custom_error_message="Input should be a string or an array of text parts",
    ),
]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    # Part of the answers given here, which clients send back as they came.
    refusal: None = None

    def to_proto(self) -> inference_pb2.ChatMessage:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return inference_pb2.ChatMessage(role="system" if self.role == "developer" else self.role, content=content)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(_Strict):
    """What both ways of asking have in common.  A field that is null counts as absent."""

    model: _NonEmpty
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _NumTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MAX_INT32)] | None = None
    # OpenAI's are signed; a negative one stands for the unsigned number of the same bits.
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_INT32)] | None = None
    speculate: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=_MAX_INT32)] | None = None
    n: Annotated[int, _only(1)] | None = None
    frequency_penalty: Annotated[float, _only(0)] | None = None
    presence_penalty: Annotated[float, _only(0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_so_far(self) -> bool:
        """Whether every event of a stream tells its counts; they go with ``include_usage``, as vLLM has it."""
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """As in SamplingParams.  Raises InvalidRequestError where fields do not go together."""

    def to_proto(self, request_id: str) -> inference_pb2.GenerateRequest:
        """Raises InvalidRequestError where fields do not go together."""
        if self.stream_options is not None and not self.stream:
            raise _invalid("stream_options", "'stream_options' goes only with 'stream': true")
        sampling = common_pb2.SamplingParams(
            max_tokens=self._max_tokens(),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed % 2**64,
            num_logprobs=self.num_logprobs,
            ignore_eos=self._ignores_eos(),
            speculate=self.speculate,
        )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        request = inference_pb2.GenerateRequest(
            model=self.model, sampling=sampling, stop=stop, request_id=request_id, priority=self.priority or 0
        )
        self._put_prompt(request)
        return request

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def _ignores_eos(self) -> bool:
        """An answer of at least ``min_tokens`` is promised only where nothing can end it before ``max_tokens``."""
        ignores = bool(self.ignore_eos)
        if self.min_tokens:
            most = self._max_tokens()
            if most is not None and self.min_tokens > most:
                raise _invalid("min_tokens", f"'min_tokens' must be at most 'max_tokens', which is {most}")
            if self.stop:
                raise _invalid("min_tokens", "'min_tokens' does not go with 'stop', which may end the answer sooner")
            if not ignores and self.min_tokens != most:
                raise _invalid(
                    "min_tokens", "'min_tokens' goes only with 'ignore_eos': true, or with as many 'max_tokens'"
                )
            ignores = True
        return ignores

    @abstractmethod
    def _put_prompt(self, request: inference_pb2.GenerateRequest) -> None: ...


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    echo: Annotated[bool, _only(False)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def _max_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def _put_prompt(self, request: inference_pb2.GenerateRequest) -> None:
        if isinstance(self.prompt, str):
            request.text = self.prompt
        elif isinstance(self.prompt[0], str):
            request.text = self.prompt[0]
        else:
            request.token_ids.ids.extend(self.prompt)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: _NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise _invalid("top_logprobs", "'top_logprobs' goes only with 'logprobs': true")
        return None

    def _max_tokens(self) -> int | None:
        if self.max_tokens is None:
            return self.max_completion_tokens
        if self.max_completion_tokens not in (None, self.max_tokens):
            raise _invalid("max_tokens", "'max_tokens' is the old name of 'max_completion_tokens'; give one of them")
        return self.max_tokens

    def _put_prompt(self, request: inference_pb2.GenerateRequest) -> None:
        request.chat.messages.extend(message.to_proto() for message in self.messages)


R = TypeVar("R", bound=GenerationRequest)


def parse(schema: type[R], body: bytes) -> R:
    """Raises InvalidRequestError, naming the first field at fault, for anything but a JSON object of ``schema``."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        message = f"the request body is not valid UTF-8 at byte {error.start}"
        raise InvalidRequestError(message, reason="INVALID_JSON") from None
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from None


def _explain(details: ErrorDetails) -> InvalidRequestError:
    kind, place = details["type"], _place(details["loc"])
    if kind == "json_invalid":
        return InvalidRequestError(
            f"the request body is not valid JSON: {details['ctx']['error']}", reason="INVALID_JSON"
        )
    if not place:
        return InvalidRequestError("the request body must be a JSON object", reason="INVALID_JSON")
    if kind == "extra_forbidden":
        return _invalid(place, f"unknown field '{place}'", "UNKNOWN_PARAMETER")
    if kind == "missing":
        return _invalid(place, f"'{place}' is required", "MISSING_REQUIRED_PARAMETER")
    message = re.sub(r"^\w+ should", f"'{place}' must", details["msg"]).replace(" after validation", "")
    given = details["input"]
    if isinstance(given, int | float | str) and ", not " not in message:
        shown = json.dumps(given)
        message += f", not {shown if len(shown) <= 64 else shown[:60] + '...'}"
    return _invalid(place, message, "INVALID_TYPE" if kind.endswith("_type") else "INVALID_VALUE")


def _place(loc: tuple[int | str, ...]) -> str:
    place = ""
    for step in loc:
        if isinstance(step, int):
            place += f"[{step}]"
        elif step not in _BRANCHES:
            place += f".{step}" if place else step
    return place if len(place) <= 128 else place[:125] + "..."


def _invalid(field: str, message: str, reason: str = "INVALID_VALUE") -> InvalidRequestError:
    return InvalidRequestError(message, reason=reason, metadata={"field": field})
