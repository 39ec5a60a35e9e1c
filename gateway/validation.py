"""From a client's request to a job that workers can run, or the reason why not."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.job import Job
from gateway.tenants import Tenant
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from kvferry.errors import InvalidRequestError, NotFoundError
from services.engine.model_files import ModelFiles
from services.runtime.tracing import MAX_REQUEST_ID_LENGTH, is_request_id

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 512
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
ROLES = ("system", "user", "assistant")
# Longer texts are tokenized on a thread: they would hold up everybody's tokens.
INLINE_TEXT_LENGTH = 4096
# Normalization may shorten a text, composed characters being shorter than their parts, but not by more than this.
NORMALIZATION_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Validator:
    files: ModelFiles
    # No longer text can fit the context; looked at before the text is tokenized.
    max_text_length: int

    @classmethod
    def for_model(cls, files: ModelFiles) -> Validator:
        longest_nbytes = files.tokenizer.longest_token_nbytes * NORMALIZATION_FACTOR
        return cls(files, files.config.context_length * longest_nbytes)

    def check_model(self, name: str) -> None:
        known = self.files.config.name
        if name and name != known:
            raise NotFoundError(f"model {name!r} is not served here; {known!r} is", reason="MODEL_NOT_FOUND")

    async def tokenize(self, prompt: str | inference_pb2.Chat) -> list[int]:
        """Raises InvalidRequestError for empty prompts and chats that the template refuses."""
        if isinstance(prompt, inference_pb2.Chat):
            return await self._tokenize(self._render(prompt), add_special=False)
        if not prompt:
            raise _invalid("prompt", "the prompt is empty")
        return await self._tokenize(prompt, add_special=True)

    async def to_job(self, request: inference_pb2.GenerateRequest, tenant: Tenant) -> Job:
        """Raises InvalidRequestError or NotFoundError; the message names the field."""
        self.check_model(request.model)
        request_id = request.request_id or secrets.token_hex(8)
        if not is_request_id(request_id):
            raise _invalid("request_id", f"must be up to {MAX_REQUEST_ID_LENGTH} printable ASCII characters")
        self._check_stop(request.stop)
        match request.WhichOneof("prompt"):
            case "text":
                prompt = await self.tokenize(request.text)
            case "chat":
                prompt = await self.tokenize(request.chat)
            case "token_ids":
                prompt = self._check_ids(request.token_ids.ids)
            case _:
                raise _invalid("prompt", "no prompt: set text, token_ids or chat")
        if not prompt:
            raise _invalid("prompt", "the prompt has no tokens")
        config = self.files.config
        if len(prompt) >= config.context_length:
            raise _invalid("prompt", f"has {len(prompt)} tokens; the model's context holds {config.context_length}, "
                                     f"the answer included", reason="PROMPT_TOO_LONG")  # fmt: skip
        return Job(request_id, prompt, self._complete(request.sampling, len(prompt)), tenant, request.priority)

    async def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        encode = self.files.tokenizer.encode
        if len(text) > self.max_text_length:
            context_length = self.files.config.context_length
            problem = f"has {len(text)} characters, far more than a context of {context_length} tokens holds"
            raise _invalid("prompt", problem, reason="PROMPT_TOO_LONG")
        if len(text) <= INLINE_TEXT_LENGTH:
            return encode(text, add_special=add_special)
        return await asyncio.to_thread(encode, text, add_special=add_special)

    def _render(self, chat: inference_pb2.Chat) -> str:
        if not chat.messages:
            raise _invalid("chat.messages", "is empty")
        for i, message in enumerate(chat.messages):
            if message.role not in ROLES:
                raise _invalid(f"chat.messages[{i}].role", f"must be one of {', '.join(ROLES)}, not {message.role!r}")
        return self.files.chat_template.render([{"role": m.role, "content": m.content} for m in chat.messages])

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise _invalid("prompt", "the prompt is empty")
        vocab_size = self.files.config.vocab_size
        if max(ids) >= vocab_size:
            raise _invalid(
                "token_ids", f"holds {max(ids)}; the vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}"
            )
        return list(ids)

    def _check_stop(self, stop: Sequence[str]) -> None:
        if len(stop) > MAX_STOP_STRINGS:
            raise _invalid("stop", f"has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for string in stop:
            if not 0 < len(string) <= MAX_STOP_LENGTH:
                raise _invalid("stop", f"strings have 1 to {MAX_STOP_LENGTH} characters, not {len(string)}")

    def _complete(self, asked: common_pb2.SamplingParams, num_prompt_tokens: int) -> common_pb2.SamplingParams:
        room = self.files.config.context_length - num_prompt_tokens
        params = common_pb2.SamplingParams()
        params.CopyFrom(asked)
        if not params.HasField("max_tokens"):
            params.max_tokens = room
        if not params.HasField("temperature"):
            params.temperature = 1.0
        if not params.HasField("top_p"):
            params.top_p = 1.0
        if not params.HasField("top_k"):
            params.top_k = 0
        if not params.HasField("seed"):
            params.seed = secrets.randbits(63)
        if params.max_tokens < 1:
            raise _invalid("max_tokens", f"must be at least 1, not {params.max_tokens}")
        if params.max_tokens > room:
            raise _invalid("max_tokens", f"is {params.max_tokens}; beside a prompt of {num_prompt_tokens} tokens the "
                                         f"context of {num_prompt_tokens + room} has room for {room}")  # fmt: skip
        if not 0 <= params.temperature <= MAX_TEMPERATURE:
            raise _invalid("temperature", f"must be between 0 and {MAX_TEMPERATURE:g}, not {params.temperature:g}")
        if not 0 < params.top_p <= 1:
            raise _invalid("top_p", f"must be above 0 and at most 1, not {params.top_p:g}")
        if params.top_k < 0:
            raise _invalid("top_k", f"must be at least 0, not {params.top_k}")
        if len(params.stop_token_ids) > MAX_STOP_TOKENS:
            raise _invalid(
                "stop_token_ids", f"has {len(params.stop_token_ids)} ids; at most {MAX_STOP_TOKENS} are allowed"
            )
        if params.HasField("num_logprobs") and not 0 <= params.num_logprobs <= MAX_LOGPROBS:
            raise _invalid("num_logprobs", f"must be between 0 and {MAX_LOGPROBS}, not {params.num_logprobs}")
        return params


def _invalid(field: str, problem: str, *, reason: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", reason=reason, metadata={"field": field})
