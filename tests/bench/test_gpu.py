"""What bench-gpu computes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from services.engine.model_files import ModelFiles
from tests.bench.gpu import transfer
from tests.bench.gpu.floors import (
    LLAMA_8B,
    SMOLLM2_135M,
    decode_nbytes,
    kv_token_nbytes,
    num_matrix_weights,
    prefill_flops,
)
from tests.bench.gpu.phases import within
from tests.bench.gpu.rows import BAR_COLOR, BAR_STEP, BAR_TOP, Row, write_json, write_png
from tests.bench.gpu.steps import decode_batch, prefill_batch


def test_the_shapes_are_the_models(smollm2: ModelFiles) -> None:
    for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
                  "vocab_size", "context_length", "rope_theta", "tied_embeddings"):  # fmt: skip
        assert getattr(SMOLLM2_135M, field) == getattr(smollm2.config, field), field
    embedding, norms = 128256 * 4096, 65 * 4096
    assert num_matrix_weights(LLAMA_8B) + embedding + norms == 8_030_261_248  # as its card says: 8.03 B


def test_floors_count_weights_once_and_kv_for_each_sequence() -> None:
    assert kv_token_nbytes(LLAMA_8B) == 128 << 10
    weights = num_matrix_weights(LLAMA_8B) * 2
    assert decode_nbytes(LLAMA_8B, 16, 4096) == weights + (8 << 30)
    assert prefill_flops(LLAMA_8B, 2048) == pytest.approx(2 * 6.98e9 * 2048, rel=0.05)
    assert prefill_flops(LLAMA_8B, 8192) > 4 * prefill_flops(LLAMA_8B, 2048)


def test_steps_are_what_they_are_called() -> None:
    step = decode_batch(3, 40)
    assert step.positions.tolist() == [39, 39, 39]
    assert sorted(step.kv_indices.tolist()) == list(range(9))
    assert prefill_batch(33).num_tokens == 33


def test_gaps_count_while_all_streams_run() -> None:
    assert within([[1.0, 2.0, 3.0, 5.0], [1.5, 2.5, 4.5]]) == [1.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="longer answers"):
        within([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.timeout(120)
def test_blocks_move_between_two_processes_in_both_directions() -> None:
    rows = transfer.measure(None, num_blocks=4, rounds=1)
    assert [row.name for row in rows] == [
        "write 8 MiB to another process (mapped)", "read 8 MiB to another process (mapped)",
    ]  # fmt: skip
    assert all(0 < row.measured_s < 30 and 0 < row.floor_s < 30 for row in rows)


def test_rows_are_told_written_and_drawn(tmp_path: Path) -> None:
    rows = [Row("decode", 0.004, 0.003), Row("prefill", 0.2, 0.1)]
    assert "0.75" in str(rows[0])
    write_json(tmp_path / "rows.json", "made up", rows)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["share"] for row in found["rows"]] == [pytest.approx(0.75), 0.5]
    write_png(tmp_path / "rows.png", "made up", rows)
    picture = Image.open(tmp_path / "rows.png").convert("RGB")
    colors = [[picture.getpixel((x, y)) for x in range(picture.width)] for y in (BAR_TOP + 8, BAR_TOP + BAR_STEP + 8)]
    assert [row.count(BAR_COLOR) for row in colors] == [301, 201]
