"""Those who compute: ours, by kernels or by torch, and the peers.  One model, the same prompts."""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from services.engine.batch import Batch, Entry, build_batch
from services.engine.gguf_weights import GgufTensors
from services.engine.kernels.packing import pack
from services.engine.kernels.runner import CompiledRunner
from services.engine.layout import KvLayout
from services.engine.model_files import ModelFiles
from services.engine.runner import TorchRunner
from services.engine.runners import kv_dtype
from services.engine.sampling_params import Sampling
from services.engine.steps import Outcome, Step
from services.engine.weights import load_weights
from tests.bench.engine.limits import large_pages

BLOCK_SIZE, CHUNK = 16, 256
STEPS = 8  # of decode that are measured together
GREEDY = Sampling()


class Engine(Protocol):
    def decode(self, batch: int, context: int) -> float:
        """Seconds a step, over STEPS of them one after the other, of ``batch`` sequences that have ``context`` tokens each
        at the first."""

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds from a prompt to its first token."""


class Ours:
    """A runner over a pool; ``torch_only``: eager torch.  A step is all of it: metadata, model, draw; those of the compiled
    kernels are handed over while the one before runs, as the engine does."""

    def __init__(self, files: ModelFiles, dtype: str, threads: int, *, torch_only: bool = False) -> None:
        config = files.config
        self.layout = KvLayout(config.revision, kv_dtype(dtype), BLOCK_SIZE, config.num_layers, config.num_kv_heads,
                               config.head_dim)  # fmt: skip
        self.num_blocks = 16 * (2048 // BLOCK_SIZE + 1)
        self.arena = large_pages(self.num_blocks * self.layout.block_nbytes)
        self._table = np.random.default_rng(0).permutation(self.num_blocks).tolist()
        weights = load_weights(config, files.path, "float32" if dtype == "int8" else dtype)
        self.weights_nbytes = sum(t.nbytes for t in _tensors(weights))
        pool = (self.layout, memoryview(self.arena), self.num_blocks, threads)
        self.inside_s = 0.0  # how long the kernels ran for a step of those measured last
        self.runner: TorchRunner | CompiledRunner
        if torch_only:
            self.runner = TorchRunner(config, weights, *pool)
        else:
            packed = pack(config, weights, dtype)
            self.weights_nbytes = packed.nbytes
            self.runner = CompiledRunner(config, packed, *pool)

    def decode(self, batch: int, context: int) -> float:
        size = (context + STEPS - 1) // BLOCK_SIZE + 1
        tables = [self._table[i * size : (i + 1) * size] for i in range(batch)]
        first, drawn = range(5, 5 + batch), range(-1, -1 - batch, -1)  # what the step before draws, whatever it is
        outcomes: list[Outcome] = []
        under_way: deque[Step] = deque()
        began = time.perf_counter()
        for n in range(STEPS):
            tokens = drawn if n and self.runner.runs_ahead else first
            entries = [Entry([t], context - 1 + n, table, GREEDY) for t, table in zip(tokens, tables, strict=True)]
            under_way.append(self.runner.start(build_batch(entries, BLOCK_SIZE)))
            if n or not self.runner.runs_ahead:
                outcomes.append(under_way.popleft().result())
        outcomes += [step.result() for step in under_way]
        taken_s = time.perf_counter() - began
        self.inside_s = sum(outcome.ended_s - outcome.began_s for outcome in outcomes) / STEPS
        return taken_s / STEPS

    def run(self, entries: Sequence[Entry]) -> Outcome:
        return self.runner.start(build_batch(entries, BLOCK_SIZE)).result()

    def prefill(self, prompt: Sequence[int]) -> float:
        began = time.perf_counter()
        for start in range(0, len(prompt), CHUNK):
            self.runner.run(self._chunk(prompt, start))
        return time.perf_counter() - began

    def _chunk(self, prompt: Sequence[int], start: int) -> Batch:
        end = min(start + CHUNK, len(prompt))
        return build_batch(
            [Entry(prompt[start:end], start, self._table, GREEDY if end == len(prompt) else None)], BLOCK_SIZE
        )


class Transformers:
    """With weights of ``dtype``: what it makes of a GGUF file by itself keeps them packed, and is slower."""

    def __init__(self, files: ModelFiles, dtype: torch.dtype, threads: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(threads)
        path, source = files.path, GgufTensors(files.path, files.config)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(source.read(name))
        self._caches: dict[tuple[int, int], Any] = {}

    def decode(self, batch: int, context: int) -> float:
        with torch.inference_mode():
            if (batch, context) not in self._caches:
                ids = torch.full((batch, context - 1), 5)
                self._caches = {(batch, context): self._model(ids, use_cache=True, logits_to_keep=1).past_key_values}
            cache = self._caches[batch, context]
            tokens = torch.full((batch, 1), 5)
            began = time.perf_counter()
            for _ in range(STEPS):
                logits = self._model(tokens, past_key_values=cache, use_cache=True).logits
                tokens = logits[:, -1:].argmax(-1)
            elapsed = time.perf_counter() - began
            cache.crop(-STEPS)
            return elapsed / STEPS

    def prefill(self, prompt: Sequence[int]) -> float:
        with torch.inference_mode():
            began = time.perf_counter()
            self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
            return time.perf_counter() - began


class LlamaCpp:
    """Where llama-cpp-python is installed.  By the C interface: the class on top of it decodes one sequence at a time."""

    @staticmethod
    def installed() -> bool:
        return importlib.util.find_spec("llama_cpp") is not None

    def __init__(self, files: ModelFiles, threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_silent(llama_cpp), None)
        self._model = llama_cpp.llama_model_load_from_file(
            str(files.path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = 16 * 544 + 2304, 16, 2048, 512
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True  # or each sequence gets a sixteenth of the context
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self._filled = (0, 0)

    def decode(self, batch: int, context: int) -> float:
        if self._filled != (batch, context):
            self._lib.llama_memory_clear(self._memory, True)
            for sequence in range(batch):
                self._run([(5, position, sequence) for position in range(context - 1)])
            self._filled = (batch, context)
        for sequence in range(batch):
            self._lib.llama_memory_seq_rm(self._memory, sequence, context - 1, -1)
        steps = range(context - 1, context - 1 + STEPS)
        taken_s = [self._run([(5, position, s) for s in range(batch)], all_logits=True) for position in steps]
        return sum(taken_s) / STEPS

    def prefill(self, prompt: Sequence[int]) -> float:
        self._lib.llama_memory_clear(self._memory, True)
        self._filled = (0, 0)
        return self._run([(token, position, 0) for position, token in enumerate(prompt)])

    def _run(self, tokens: Sequence[tuple[int, int, int]], *, all_logits: bool = False) -> float:
        """Seconds for (token, position, sequence) each; logits of all of them or of the last."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = all_logits or i == len(tokens) - 1
        began = time.perf_counter()
        if failed := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp: llama_decode returned {failed}")
        self._lib.llama_synchronize(self._context)
        return time.perf_counter() - began


def _silent(llama_cpp: Any) -> Any:
    global _log  # what C calls must not be collected
    _log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return _log


def _tensors(weights: Any) -> list[torch.Tensor]:
    found = [weights.embedding] if weights.head is weights.embedding else [weights.embedding, weights.head]
    return found + [t for layer in weights.layers for t in (layer.qkv, layer.output, layer.gate_up, layer.down)]
