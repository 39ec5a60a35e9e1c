"""The GPU's bench on the CPU: what it computes, and all of its works with tiny shapes and stand-ins for what is a GPU's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from services.engine.batch import following, same_places
from services.engine.model_config import ModelConfig
from services.engine.model_files import ModelFiles, open_model
from services.engine.weights import load_weights
from tests.bench.gpu import models, steps, transfer
from tests.bench.gpu.bench import main
from tests.bench.gpu.floors import (
    BLOCK_SIZE,
    LLAMA_8B,
    SMOLLM2_135M,
    decode_nbytes,
    fitting,
    kv_token_nbytes,
    num_matrix_weights,
    prefill_flops,
    tiny,
    weights_nbytes,
)
from tests.bench.gpu.phases import within
from tests.bench.gpu.rows import (
    BAR_COLOR,
    BAR_STEP,
    BAR_TOP,
    GOAL_COLOR,
    Book,
    NotMeasured,
    Row,
    less_is_better,
    moved,
    write_png,
)
from tests.bench.gpu.steps import bounds, decode_batches, make_runner, prefill_batch, table_blocks, walk
from tests.engine import fake_flashinfer
from tests.engine.fake_device import FakeDevice

CPU = torch.device("cpu")
TINY = tiny(LLAMA_8B)
SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size",
         "context_length", "rope_theta", "tied_embeddings")  # fmt: skip


def test_the_shapes_are_the_models(smollm2: ModelFiles) -> None:
    for field in SHAPE:
        assert getattr(SMOLLM2_135M, field) == getattr(smollm2.config, field), field
    embedding, norms = 128256 * 4096, 65 * 4096
    assert num_matrix_weights(LLAMA_8B) + embedding + norms == 8_030_261_248  # as its card says: 8.03 B
    assert weights_nbytes(LLAMA_8B) == 2 * (8_030_261_248 - norms)


def test_floors_count_weights_once_and_kv_for_each_sequence() -> None:
    assert kv_token_nbytes(LLAMA_8B) == 128 << 10
    weights = num_matrix_weights(LLAMA_8B) * 2
    assert decode_nbytes(LLAMA_8B, 16, 4096) == weights + (8 << 30)
    assert prefill_flops(LLAMA_8B, 2048) == pytest.approx(2 * 6.98e9 * 2048, rel=0.05)
    assert prefill_flops(LLAMA_8B, 8192) > 4 * prefill_flops(LLAMA_8B, 2048)


def test_what_does_not_fit_is_left_out_by_name() -> None:
    fit, beyond = fitting(LLAMA_8B, (1, 64, 256), (512, 4096), 48e9)
    assert fit == [(1, 512), (1, 4096), (64, 512), (256, 512)]
    assert beyond == [(64, 4096), (256, 4096)]


def test_a_walk_is_steps_that_follow_each_other_around_its_context() -> None:
    first, last = bounds(512, 20)
    walked = decode_batches(3, first, last)
    assert len(walked) == 21
    assert (walked[1].positions[0] + 1 + walked[-1].positions[0] + 1) / 2 == pytest.approx(512, abs=1)
    for before, step in pairwise(walked):
        foreseen = following(before, BLOCK_SIZE)
        assert foreseen is not None
        assert same_places(foreseen, step)
    assert sorted(walked[-1].kv_indices.tolist()) == [
        block for i in range(3) for block in range(i * table_blocks(last), (i + 1) * table_blocks(last) - 1)
    ]
    assert prefill_batch(33).num_tokens == 33


def test_the_runner_foresees_every_step_of_a_walk() -> None:
    machine = steps.Machine(CPU, fake_flashinfer, FakeDevice)
    runner = make_runner(TINY, 5 * table_blocks(44), 5, machine)
    runner.warm_up()
    took_s, num_foreseen = walk(runner, decode_batches(5, 24, 44))
    assert took_s > 0
    assert num_foreseen == 20


@pytest.mark.parametrize("config", [tiny(SMOLLM2_135M), TINY], ids=["tied", "untied"])
def test_a_saved_shape_is_a_model_that_can_be_served(config: ModelConfig) -> None:
    with models.saved(config, CPU) as folder:
        files = open_model(str(folder))
        weights = load_weights(files.config, files.path, "bfloat16")
        assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < weights_nbytes(config) * 1.02
    for field in (*SHAPE, "name"):
        assert getattr(files.config, field) == getattr(config, field), field
    assert files.tokenizer.vocab_size == config.vocab_size
    assert files.tokenizer.decode([300, 40000]) == "w300w40000"
    assert (weights.head is weights.embedding) == config.tied_embeddings
    assert torch.equal(weights.layers[0].qkv, weights.layers[1].qkv)
    assert 0.5 < weights.layers[1].down.float().std() * config.intermediate_size**0.5 < 2
    assert not folder.exists()


def test_a_shape_that_finds_no_room_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "weights_nbytes", lambda config: 1 << 60)
    with pytest.raises(OSError, match=r"needs \d+ GB in .*TMPDIR"), models.saved(TINY, CPU):
        pass


def test_gaps_count_while_all_streams_run() -> None:
    assert within([[1.0, 2.0, 3.0, 5.0], [1.5, 2.5, 4.5]]) == [1.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="longer answers"):
        within([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.timeout(120)
def test_blocks_move_between_two_processes_in_both_directions() -> None:
    rows = list(transfer.measure(LLAMA_8B, None, 9 << 20, rounds=1))
    assert [row.work for row in rows] == [
        "llama-3.1-8b write 4 blocks of 2048 KiB to another process (mapped)",
        "llama-3.1-8b read 4 blocks of 2048 KiB to another process (mapped)",
    ]
    assert all(row.ours > 0 and row.peer > 0 and row.unit == "GB/s" for row in rows)


def test_rows_say_how_much_better() -> None:
    decode = less_is_better("decode", 0.004, 0.003, 0.75, "20 of 20 steps foreseen")
    assert decode == Row("decode", 4.0, 3.0, 0.75, 0.75, "ms", "20 of 20 steps foreseen")
    assert "met: 0.75  (20 of 20" in str(decode)
    assert "missed: 0.85" in str(moved("write", 10**9, 0.2, 0.1, 0.85))
    assert moved("write", 10**9, 0.2, 0.1) == Row("write", 5.0, 10.0, 0.5, None, "GB/s")


def test_each_row_is_in_the_files_at_once(tmp_path: Path) -> None:
    book = Book(tmp_path / "out", {"device": "made up", "driver": None})
    read = (tmp_path / "out" / "rows.json").read_text
    book.add(Row("decode", 4.0, 3.0, 0.75, 0.75, "ms"))
    assert json.loads(read())["rows"] == [
        {"work": "decode", "ours": 4.0, "peer": 3.0, "ratio": 0.75, "goal": 0.75, "unit": "ms", "note": ""}
    ]
    book.add(NotMeasured("prefill", "no room"))
    book.add(Row("write", 5.0, 10.0, 0.5, None, "GB/s"))
    found = json.loads(read())
    assert found["machine"] == {"device": "made up", "driver": None}
    assert found["not_measured"] == [{"work": "prefill", "why": "no room"}]
    assert [row["work"] for row in found["rows"]] == ["decode", "write"]
    write_png(tmp_path / "again.png", "made up", book.rows)
    assert (tmp_path / "out" / "rows.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    picture = Image.open(tmp_path / "out" / "rows.png").convert("RGB")
    colors = [[picture.getpixel((x, y)) for x in range(picture.width)] for y in (BAR_TOP + 8, BAR_TOP + BAR_STEP + 8)]
    assert [row.count(BAR_COLOR) for row in colors] == [300, 201]
    assert [row.count(GOAL_COLOR) for row in colors] == [2, 0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rows.json", "rows.png"]


@pytest.mark.timeout(120)
def test_a_rehearsal_runs_every_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path)
    assert main(["--rehearse", "--rounds", "3", "--shapes", "llama-3.1-8b", "--out", out]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    name = TINY.name
    assert [row["work"].partition(" (")[0] for row in found["rows"]] == [
        f"{name} write 128 blocks of 8 KiB to another process", f"{name} read 128 blocks of 8 KiB to another process",
        f"{name} decode 1 x 40", f"{name} decode 1 x 70", f"{name} decode 5 x 40", f"{name} decode 5 x 70",
        f"{name} prefill 33", f"{name} prefill 100",
        f"{name} TTFT of 300 tokens, split; peer: on one worker",
        f"{name} p99 ITL beside prompts of 300, split", f"{name} p99 ITL beside prompts of 300, colocated",
    ]  # fmt: skip
    assert [row["note"] for row in found["rows"] if "decode" in row["work"]] == ["3 of 3 steps foreseen"] * 4
    assert all(row["ours"] > 0 and row["peer"] > 0 and row["ratio"] > 0 for row in found["rows"])
    assert found["not_measured"] == []
    machine = found["machine"]
    assert machine["torch"] == torch.__version__
    assert {"device", "driver", "cuda", "flashinfer", "commit"} <= set(machine)
    assert machine["copy_gb_read_and_written_per_s"] > 0
    assert machine["matmul_tflop_per_s"] > 0
    assert "GB/s copied (read and written)" in capsys.readouterr().out
    assert (tmp_path / "rows.png").exists()


def test_a_work_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Iterator[Row]:
        yield moved("first", 1, 1.0, 1.0)
        raise RuntimeError("no path to the other process")

    monkeypatch.setattr(transfer, "measure", fail)
    arguments = ["--rehearse", "--rounds", "1", "--only", "transfer", "prefill", "--shapes", "smollm2-135m"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "rows.json").read_text())
    name = tiny(SMOLLM2_135M).name
    assert [row["work"] for row in found["rows"]] == ["first", f"{name} prefill 33", f"{name} prefill 100"]
    why = "failed with RuntimeError: no path to the other process"
    assert found["not_measured"] == [{"work": f"{name} transfer", "why": why}]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no CUDA device" in told
    assert not (tmp_path / "out").exists()
