"""A front door that plays what a test wrote, over a vocabulary of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.answer import Outlet, deliver
from gateway.http.app import Vocabulary
from gateway.tenants import Tenant
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2

MODEL = "test/model-1"
END = 256

Response = inference_pb2.GenerateResponse
Step = Response | Exception | asyncio.Event


def token_bytes(token_id: int) -> bytes:
    return b"" if token_id == END else bytes([token_id])


def token_text(token_id: int) -> str:
    return "<end>" if token_id == END else token_bytes(token_id).decode(errors="replace")


VOCABULARY = Vocabulary(text=token_text, bytes=token_bytes)


def started() -> Response:
    return Response(started=inference_pb2.Started(request_id="r", model=MODEL, num_prompt_tokens=7, seed=3))


def chunk(text: str, ids: Sequence[int] | None = None, *, start: int = 0, num_top: int | None = None) -> Response:
    """Without ``ids``: a token for each byte of ``text``.  With ``num_top``: log-probabilities, -1 for the token and -2,
    -3, ... for the alternatives, whose ids follow the token's."""
    ids = list(text.encode()) if ids is None else ids
    tokens = [common_pb2.Token(index=start + i, id=id_) for i, id_ in enumerate(ids)]
    if num_top is not None:
        for token in tokens:
            token.logprob = -1.0
            for k in range(num_top):
                token.top_logprobs.add(token_id=(token.id + k) % 256, logprob=-1.0 - k)
    return Response(chunk=inference_pb2.Chunk(tokens=tokens, text=text))


def finished(reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_STOP) -> Response:
    return Response(
        finished=inference_pb2.Finished(
            reason=reason,
            usage=inference_pb2.Usage(num_prompt_tokens=7, num_output_tokens=5, num_cached_tokens=4),
            timeline=inference_pb2.Timeline(
                ttft_us=2**40,
                decode_worker="decode-0",
                transfer=common_pb2.TransferStats(
                    num_blocks=2,
                    path="mapped",
                    chunks=[common_pb2.ChunkTimes(compute_end_us=end) for end in (5, 9)],
                ),
            ),
        )
    )


class ScriptedFrontDoor:
    """Plays ``script`` to every request: sends responses, raises exceptions, waits for events."""

    def __init__(self, *script: Step) -> None:
        self.script: Sequence[Step] = script
        self.model = common_pb2.ModelInfo(name=MODEL, revision="rev-9", context_length=64, vocab_size=257)
        self.ready = True
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.tenants: list[Tenant] = []
        self.num_running = 0
        self.num_cancelled = 0
        self.waiting = asyncio.Event()
        self.idle = asyncio.Event()

    async def generate(self, request: inference_pb2.GenerateRequest, tenant: Tenant, outlet: Outlet) -> None:
        self.requests.append(request)
        self.tenants.append(tenant)
        self.num_running += 1
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    self.waiting.set()
                    await step.wait()
                else:
                    await deliver(step, outlet)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
            self.idle.set()
