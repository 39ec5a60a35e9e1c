from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from services.engine.layout import KvLayout

LAYOUT = KvLayout(model_revision="r1", dtype="float32", block_size=16, num_layers=30, num_kv_heads=3, head_dim=64)


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    assert LAYOUT.block_nbytes == 30 * 2 * 16 * 3 * 64 * 4
    for half in ("bfloat16", "float16"):
        assert replace(LAYOUT, dtype=half).block_nbytes == LAYOUT.block_nbytes // 2
    assert LAYOUT.block_nbytes == 16 * LAYOUT.token_nbytes == 16 * 30 * 2 * LAYOUT.row_nbytes
    assert LAYOUT.block_shape == (30, 2, 16, 3, 64)


CONTENT = [{"model_revision": "r2"}, {"num_layers": 29}, {"num_kv_heads": 6}, {"head_dim": 32}]
FORM = [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"block_size": 32}]


@pytest.mark.parametrize("change", CONTENT + FORM)
def test_whatever_differs_shows_in_the_fingerprint(change: dict[str, object]) -> None:
    assert replace(LAYOUT, **change).fingerprint != LAYOUT.fingerprint  # type: ignore[arg-type]


def test_the_content_fingerprint_leaves_out_what_can_be_converted() -> None:
    for change in FORM:
        assert replace(LAYOUT, **change).content_fingerprint == LAYOUT.content_fingerprint  # type: ignore[arg-type]
    for change in CONTENT:
        assert replace(LAYOUT, **change).content_fingerprint != LAYOUT.content_fingerprint  # type: ignore[arg-type]


def test_another_process_has_the_same_fingerprint() -> None:
    code = f"from services.engine.layout import KvLayout; print({LAYOUT!r}.fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == LAYOUT.fingerprint


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"block_size": 0}])
def test_nonsense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(LAYOUT, **change)  # type: ignore[arg-type]
