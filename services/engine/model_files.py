"""One call from ``--model`` to everything about it that is not weights.  No torch: weights are ``weights.py``'s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.engine import gguf_checkpoint, gguf_tokenizer, hf_checkpoint
from services.engine.chat import ChatTemplate
from services.engine.checkpoint import locate, model_name
from services.engine.gguf_file import GgufFile
from services.engine.model_config import ModelConfig
from services.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """``path``: a ``.gguf`` file or a Hugging Face directory."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate


def open_model(model: str) -> ModelFiles:
    """Finds and reads ``model`` (see ``checkpoint.locate``); blocks for about a second, longer when it must be downloaded.
    Raises ModelError."""
    path, name = locate(model), model_name(model)
    if path.is_file():
        return _open_gguf(path, name)
    config = hf_checkpoint.read_config(path, name)
    tokenizer = hf_checkpoint.read_tokenizer(path, config)
    special = _special_tokens(config, tokenizer) | hf_checkpoint.read_special_tokens(path)
    template = ChatTemplate(hf_checkpoint.read_chat_template(path), model=name, special_tokens=special)
    return ModelFiles(path, config, tokenizer, template)


def _open_gguf(path: Path, name: str) -> ModelFiles:
    file = GgufFile(path)
    config = gguf_checkpoint.read_config(file, name)
    tokenizer = gguf_tokenizer.read_tokenizer(file, config)
    source = file.metadata.get("tokenizer.chat_template")
    template = ChatTemplate(
        source if isinstance(source, str) else None, model=name, special_tokens=_special_tokens(config, tokenizer)
    )
    return ModelFiles(path, config, tokenizer, template)


def _special_tokens(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, str]:
    ids = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None)}
    return {kind: token for kind, token_id in ids.items() if (token := tokenizer.token(token_id)) is not None}
