"""Packed weights on disk: the same numbers, stored once, never a damaged or a stale file, and no torch to map them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.engine.kernels import cache
from services.engine.kernels.packed import PackedWeights
from services.engine.kernels.packing import pack
from tests.engine.test_kernels import make_config, make_weights, on_sixteen_steps


def content(weights: PackedWeights) -> list[bytes]:
    return [ctypes.string_at(part.data_ptr(), part.nbytes) for part in weights.parts()]


def packed(dtype: str = "int8", *, tied: bool = False) -> PackedWeights:
    config = make_config(tied=tied, bias=not tied)
    return pack(config, on_sixteen_steps(make_weights(config)), dtype)


def never() -> PackedWeights:
    raise AssertionError("packed although it is in the cache")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_mapped_is_what_was_packed(tmp_path: Path, dtype: str, tied: bool) -> None:
    given = packed(dtype, tied=tied)
    assert dtype != "int8" or {m.format for m in given.matrices()} == {"int8", "int4"}
    for mapped in (cache.load_or_pack(tmp_path, "w", lambda: given), cache.load_or_pack(tmp_path, "w", never)):
        assert mapped is not given
        assert content(mapped) == content(given)
        assert (mapped.dtype, mapped.nbytes) == (dtype, given.nbytes)
        assert (mapped.head is mapped.embedding) == tied
        for mine, its in zip(mapped.matrices(), given.matrices(), strict=True):
            assert (mine.num_rows, mine.num_columns, mine.format) == (its.num_rows, its.num_columns, its.format)
        for ours, theirs in zip(mapped.layers, given.layers, strict=True):
            assert (ours.qkv_bias is None) == (theirs.qkv_bias is None)
        assert all(part.data_ptr() % 64 == 0 for part in mapped.parts())
    assert not list(tmp_path.glob("*.partial"))


def test_of_several_at_once_one_packs(tmp_path: Path) -> None:
    given, packings = packed(), []

    def pack_slowly() -> PackedWeights:
        packings.append(1)
        waiting.wait(0.3)
        return given

    waiting = threading.Event()
    found: list[PackedWeights] = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.load_or_pack(tmp_path, "w", pack_slowly))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packings) == 1
    assert [content(weights) for weights in found] == [content(given)] * 3


@pytest.mark.parametrize("damage", ["cut", "longer", "garbled", "empty", "points outside"])
def test_a_damaged_file_is_packed_anew(tmp_path: Path, damage: str) -> None:
    given = packed()
    cache.load_or_pack(tmp_path, "w", lambda: given)
    (path,) = tmp_path.glob("*.packed")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-1],
            "longer": whole + b"x",
            "garbled": b"\xff" + whole[1:],
            "empty": b"",
            "points outside": whole.replace(b'"offsets": [0,', b'"offsets": [9' + b"9" * 9 + b",", 1)[: len(whole)],
        }[damage]
    )
    assert content(cache.load_or_pack(tmp_path, "w", lambda: given)) == content(given)
    assert path.read_bytes() == whole


def test_a_changed_model_file_has_another_key(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"one")
    first = cache.key("r", "int8", [model])
    assert first == cache.key("r", "int8", [model])
    assert len({first, cache.key("r", "bfloat16", [model]), cache.key("s", "int8", [model])}) == 3
    os.utime(model, ns=(1, 1))
    assert cache.key("r", "int8", [model]) != first


def test_another_way_of_packing_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.key("r", "int8", [])
    changed = tmp_path / "packing.py"
    changed.write_text("another order")
    monkeypatch.setattr(cache, "_SOURCES", (*cache._SOURCES, changed))
    cache.packing_version.cache_clear()
    assert cache.key("r", "int8", []) != before
    monkeypatch.undo()
    cache.packing_version.cache_clear()


def test_what_was_unused_for_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = packed()
    for name in ("old", "used"):
        cache.load_or_pack(tmp_path, name, lambda: given)
    nbytes = (tmp_path / "old.packed").stat().st_size
    os.utime(tmp_path / "used.packed", (1, 1))
    os.utime(tmp_path / "old.packed", (2, 2))
    cache.load_or_pack(tmp_path, "used", never)  # which makes it the newest
    monkeypatch.setattr(cache, "MAX_NBYTES", 2 * nbytes)
    cache.load_or_pack(tmp_path, "new", lambda: given)
    assert {path.stem for path in tmp_path.glob("*.packed")} == {"used", "new"}


def test_a_folder_that_cannot_be_used_costs_the_cache_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = packed()
    assert cache.load_or_pack(tmp_path / "file" / "below", "w", lambda: given) is given


def test_a_worker_is_imported_without_torch() -> None:
    """Its import takes seconds; with weights in the cache nothing needs it."""
    code = "import sys, services.decode.__main__, services.prefill.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
