"""A worker of dynamo's runtime that computes nothing: each stream is sent a token a step.

python -m tests.bench.gateway.dynamo_worker FOLDER MODEL GROUPS

FOLDER gets what dynamo reads of the model: the configuration and the tokenizer, in Hugging Face's formats.  Its input sets
the pace as it sets the null workers'.  Where it meets the frontend, the environment says (DYN_FILE_KV).
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dynamo._core import DistributedRuntime, ModelInput, ModelType, WorkerType, register_model

from services.engine.model_files import open_model
from tests.bench.gateway.null_workers import Pace
from tests.bench.gateway.words import Words

ENDPOINT = "bench.backend.generate"


class Group:
    def __init__(self) -> None:
        self.drawn = 0
        self.stepped = asyncio.Event()

    async def run(self, pace: Pace, place: float, words: Words) -> None:
        while True:
            await pace.step(place)
            self.drawn = words.id(time.monotonic())
            stepped, self.stepped = self.stepped, asyncio.Event()
            stepped.set()


class Engine:
    def __init__(self, num_groups: int) -> None:
        self.groups = [Group() for _ in range(num_groups)]
        self._num_streams = 0

    async def generate(self, request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
        group = self.groups[self._num_streams % len(self.groups)]
        self._num_streams += 1
        for _ in range(request["stop_conditions"]["max_tokens"]):
            await group.stepped.wait()
            yield {"token_ids": [group.drawn]}
        yield {"token_ids": [], "finish_reason": "length"}


def save_for_dynamo(model: str, folder: Path) -> None:
    """From the GGUF file, by transformers; once, as that takes long to load."""
    if (folder / "tokenizer.json").exists():
        return
    import transformers

    gguf = open_model(model).path
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = transformers.AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config.architectures = ["LlamaForCausalLM"]
    for part in (config, transformers.GenerationConfig(), tokenizer):  # the tokenizer last: where it is, all is
        part.save_pretrained(folder)


async def serve(folder: Path, model: str, num_groups: int) -> None:
    pace = Pace()
    threading.Thread(target=pace.follow, args=(sys.stdin,), daemon=True).start()
    words, engine = Words(open_model(model)), Engine(num_groups)
    save_for_dynamo(model, folder)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    endpoint = runtime.endpoint(ENDPOINT)
    async with asyncio.TaskGroup() as running:
        for number, group in enumerate(engine.groups):
            running.create_task(group.run(pace, number / num_groups, words))
        serving = asyncio.ensure_future(endpoint.serve_endpoint(engine.generate))
        await register_model(
            ModelInput.Tokens, ModelType.Chat, endpoint, str(folder), model, worker_type=WorkerType.Aggregated
        )
        print("ready", flush=True)
        await serving


def main() -> None:
    folder, model, num_groups = sys.argv[1:]
    asyncio.run(serve(Path(folder), model, int(num_groups)))


if __name__ == "__main__":
    main()
