"""The stand-in takes what the package takes, in the versions that pyproject.toml allows and in the one installed here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from services.engine import flashinfer_kernels
from services.engine.model_config import ModelError
from tests.engine import fake_flashinfer
from tests.engine.flashinfer_signatures import DECODE, PREFILL, RECORD, USED, Signature, read, record, signature_of

RECORDED: dict[str, dict[str, Signature]] = json.loads(RECORD.read_text(encoding="utf-8"))
FAKE = Path(fake_flashinfer.__file__).read_text(encoding="utf-8")
SEAM = Path(flashinfer_kernels.__file__).read_text(encoding="utf-8")
SEAM_NAMES = {
    f"{PREFILL}.__init__": f"FlashInfer.{PREFILL}",
    f"{DECODE}.__init__": f"FlashInfer.{DECODE}",
    **{f"{PREFILL}.{name}": f"PrefillWrapper.{name}" for name in ("plan", "run")},
    **{f"{DECODE}.{name}": f"DecodeWrapper.{name}" for name in ("plan", "run")},
}


def require_callable_as(ours: Signature, theirs: Signature) -> None:
    """Whatever is called by ``ours`` can be called by ``theirs``, with the same meaning."""
    positional = ours["positional"]
    names = theirs["positional"] + theirs["keywords"]
    assert theirs["required"] == positional[: len(theirs["required"])], "what must be given is given, in its order"
    assert set(positional + ours["keywords"]) <= set(names), "and nothing that is unknown"


@pytest.mark.parametrize("version", RECORDED)
@pytest.mark.parametrize("name", USED)
def test_the_seam_and_the_stand_in_have_the_packages_signatures(version: str, name: str) -> None:
    theirs = RECORDED[version][name]
    require_callable_as(signature_of(FAKE, name), theirs)
    require_callable_as(signature_of(SEAM, SEAM_NAMES.get(name, f"FlashInfer.{name}")), theirs)


@pytest.mark.parametrize("name", USED)
def test_the_stand_in_takes_whatever_the_seam_may_be_given(name: str) -> None:
    ours = signature_of(SEAM, SEAM_NAMES.get(name, f"FlashInfer.{name}"))
    theirs = signature_of(FAKE, name)
    assert set(ours["positional"] + ours["keywords"]) <= set(theirs["positional"] + theirs["keywords"])


def test_the_record_is_what_is_installed() -> None:
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("flashinfer-python is not installed; the recorded signatures stand for it")
    package = Path(spec.submodule_search_locations[0])
    found = read(package)
    for name, signature in found.items():
        require_callable_as(signature_of(FAKE, name), signature)
    version = record(package)
    if version in RECORDED:
        assert found == RECORDED[version]


def test_where_kernels_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flashinfer.py").write_text("raise OSError(30, 'Read-only file system', '/var/lib/kvferry/.cache')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    with pytest.raises(ModelError, match=r"Read-only file system.*FLASHINFER_WORKSPACE_BASE"):
        flashinfer_kernels.load()
