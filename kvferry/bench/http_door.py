"""Into any server of OpenAI's HTTP API, by its completions.  Needs the extra ``load``."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from kvferry import errors
from kvferry.bench.doors import Target
from kvferry.bench.workload import Prompt

# Token ids below it are words in every vocabulary in use; the API does not tell how large the model's is.
VOCAB_SIZE = 32_000
MODELS_TIMEOUT_S = 30.0
_DATA, _DONE = b"data:", b"[DONE]"


class HttpDoor:
    """``session`` is the caller's.  Answers are as long as asked, and counted token by token, where the server knows
    vLLM's ``ignore_eos`` and ``continuous_usage_stats``."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str = "") -> None:
        """``url`` as OpenAI's clients take it, such as http://127.0.0.1:8471/v1."""
        self._session = session
        self._url = url.rstrip("/")
        self._model = model

    async def target(self) -> Target:
        with_timeout = aiohttp.ClientTimeout(total=MODELS_TIMEOUT_S)
        async with _mapped(), self._session.get(f"{self._url}/models", timeout=with_timeout) as response:
            await _check(response)
            served = (await response.json())["data"]
        for model in served:
            if self._model in ("", model["id"]):
                self._model = model["id"]
                return Target(model["id"], model.get("max_model_len"), VOCAB_SIZE)
        raise errors.NotFoundError(f"{self._url} does not serve {self._model!r}", reason="MODEL_NOT_FOUND")

    async def stream(self, prompt: Prompt, num_output_tokens: int, timeout_s: float) -> AsyncGenerator[int, None]:
        """After ``target``.  Where events do not tell the tokens so far, one with text counts as one token, and
        those of the usage at the end that are missing count with the last event."""
        asked = {
            "model": self._model, "prompt": prompt, "max_tokens": num_output_tokens, "ignore_eos": True,
            "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        num_seen, done = 0, False
        with_timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with (
            _mapped(),
            self._session.post(f"{self._url}/completions", json=asked, timeout=with_timeout) as response,
        ):
            await _check(response)
            async for line in response.content:
                if not line.startswith(_DATA):
                    continue
                data = line[len(_DATA) :].strip()
                if data == _DONE:
                    done = True
                    break
                event = json.loads(data)
                if (failure := event.get("error")) is not None:
                    raise errors.InternalError(str(failure.get("message")), reason=_reason(failure))
                if (usage := event.get("usage")) is not None:
                    num_new = usage["completion_tokens"] - num_seen
                else:
                    num_new = 1 if any(choice["text"] for choice in event["choices"]) else 0
                if num_new > 0:
                    num_seen += num_new
                    yield num_new
            if not done:
                raise errors.UnavailableError("the answer broke off", reason="BROKEN_OFF")


@asynccontextmanager
async def open_http_door(
    url: str, api_key: str | None, ca: Path | None, model: str, max_open: int
) -> AsyncIterator[HttpDoor]:
    """Up to ``max_open`` connections, one for each stream.  ``ca`` says whose certificates to trust; None: the system's.
    Raises InvalidRequestError where it cannot be read."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        trusted = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise errors.InvalidRequestError(f"{ca} holds no certificates: {error.strerror or error}") from error
    connector = aiohttp.TCPConnector(limit=max_open, ssl=trusted)
    async with aiohttp.ClientSession(connector=connector, headers=headers, read_bufsize=1 << 16) as session:
        yield HttpDoor(session, url, model)


@asynccontextmanager
async def _mapped() -> AsyncIterator[None]:
    """aiohttp's failures as kvferry's."""
    try:
        yield
    except TimeoutError as error:
        raise errors.DeadlineError("the answer did not end in time") from error
    except aiohttp.ClientError as error:
        raise errors.UnavailableError(str(error) or repr(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.InternalError(f"this is not what OpenAI's API answers: {error!r}", reason="BAD_ANSWER") from error


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raises kvferry.Error for any status but 200."""
    if response.status == 200:
        return
    text = await response.text()
    try:
        failure = json.loads(text)["error"]
        message, reason = str(failure["message"]), _reason(failure)
    except (ValueError, KeyError, TypeError):
        message, reason = f"HTTP {response.status}: {text[:200]}", f"HTTP_{response.status}"
    kind = _BY_STATUS.get(response.status, errors.InternalError)
    raise kind(message, reason=reason, retry_after_s=_seconds(response.headers.get("retry-after")))


def _reason(failure: dict[str, Any]) -> str:
    return str(failure.get("code") or failure.get("type") or "INTERNAL").upper()


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None  # a date


_BY_STATUS: dict[int, type[errors.Error]] = {
    400: errors.InvalidRequestError,
    401: errors.UnauthenticatedError,
    403: errors.PermissionDeniedError,
    404: errors.NotFoundError,
    429: errors.OverloadedError,
    503: errors.UnavailableError,
    504: errors.DeadlineError,
}
