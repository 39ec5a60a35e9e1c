"""What a narrow format costs in quality: python -m tests.bench.engine --only quality

On prose that the model has not seen (this repository's documents) and on prose that it makes up itself: the perplexity
against float32's, and at how many positions the likeliest token is the same.  Every format computes token by token with the
compiled kernels, in windows of 256 tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.engine.batch import Entry, build_batch
from services.engine.kernels.packing import pack
from services.engine.kernels.runner import CompiledRunner
from services.engine.layout import KvLayout
from services.engine.model_files import ModelFiles
from services.engine.runners import kv_dtype
from services.engine.sampling_params import Sampling
from services.engine.weights import load_weights
from tests.bench.engine.rows import Row

ROOT = Path(__file__).resolve().parents[3]
WINDOW, NUM_WINDOWS = 256, 8
BLOCK_SIZE = 16

F32 = npt.NDArray[np.float32]


class Reader:
    """Windows side by side, a token of each at a time."""

    def __init__(self, files: ModelFiles, dtype: str) -> None:
        config = files.config
        weights = load_weights(config, files.path, "float32")
        layout = KvLayout(config.revision, kv_dtype(dtype), BLOCK_SIZE, config.num_layers, config.num_kv_heads,
                          config.head_dim)  # fmt: skip
        per_window = WINDOW // BLOCK_SIZE
        num_blocks = per_window * NUM_WINDOWS
        self._arena = bytearray(num_blocks * layout.block_nbytes)
        self._tables = np.arange(num_blocks).reshape(NUM_WINDOWS, per_window).tolist()
        self._runner = CompiledRunner(
            config, pack(config, weights, dtype), layout, memoryview(self._arena), num_blocks, 2
        )

    def step(self, tokens: list[int], position: int) -> F32:
        """[windows, vocab]: what comes after ``tokens``, one of each window."""
        entries = [Entry([t], position, table, Sampling()) for t, table in zip(tokens, self._tables, strict=True)]
        return self._runner.logits(build_batch(entries, BLOCK_SIZE))


def made_up(files: ModelFiles) -> list[list[int]]:
    reader = Reader(files, "float32")
    starts = ["The", "Once upon a time", "Dear", "In 1870", "First,", "def", "She", "Water"]
    windows = [files.tokenizer.encode(text, add_special=True)[:1] for text in starts]
    draws = np.random.default_rng(0)
    for position in range(WINDOW - 1):
        for window, row in zip(windows, reader.step([w[-1] for w in windows], position), strict=True):
            window.append(int((row + draws.gumbel(size=row.shape)).argmax()))
    return windows


def written(files: ModelFiles) -> list[list[int]]:
    paths = [ROOT / "README.md", *sorted((ROOT / "docs" / "adr").glob("000[1-4]*.md"))]
    ids = files.tokenizer.encode("\n".join(path.read_text() for path in paths), add_special=True)
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(NUM_WINDOWS)]


def read(files: ModelFiles, dtype: str, windows: list[list[int]]) -> tuple[float, npt.NDArray[np.int64]]:
    """Perplexity, and the likeliest token at each position."""
    reader, surprise, best = Reader(files, dtype), [], []
    for position in range(WINDOW - 1):
        rows = reader.step([w[position] for w in windows], position).astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        total = np.log(np.exp(rows).sum(-1))
        surprise += [total[i] - rows[i, w[position + 1]] for i, w in enumerate(windows)]
        best += rows.argmax(-1).tolist()
    return float(np.exp(np.mean(surprise))), np.array(best)


def measure(files: ModelFiles, dtypes: list[str]) -> list[Row]:
    """Against float32: perplexity, as the ratio that a goal of 0.99 bounds, and the share of equal likeliest tokens."""
    rows = []
    for name, windows in (("written", written(files)), ("made up", made_up(files))):
        expected, best = read(files, "float32", windows)
        for dtype in dtypes:
            if dtype == "float32":
                continue
            found, own = read(files, dtype, windows)
            what, same = f"{dtype}, {len(best)} positions, {name}", float((own == best).mean())
            rows.append(Row(f"{what}: perplexity", found, expected, round(expected / found, 4), 0.99, "perplexity"))
            rows.append(
                Row(f"{what}: the likeliest token is float32's", same, 1.0, round(same, 4), 0.99, "of positions")
            )
    return rows
