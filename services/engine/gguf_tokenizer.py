"""A tokenizer from a GGUF file's metadata.  No torch."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from services.engine.gguf_file import GgufFile
from services.engine.model_config import ModelConfig, ModelError
from services.engine.tokenizer import Tokenizer, byte_of_letter

_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_GPT2 = ("gpt-2", "default")
_SMOLLM = ("smollm",)


def read_tokenizer(file: GgufFile, config: ModelConfig) -> Tokenizer:
    kind = file.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        backend = _byte_level(file)
    elif kind == "llama":
        backend = _sentencepiece(file)
    else:
        raise ModelError(f"the tokenizer {kind!r} of {file.path} is not supported; supported are gpt2 and llama")
    _add_written_tokens(backend, file, byte_level=kind == "gpt2")
    if _adds_bos(file) and config.bos_token_id is not None:
        bos = backend.id_to_token(config.bos_token_id)
        if bos is None:
            raise ModelError(f"the tokenizer of {file.path} has no token {config.bos_token_id}, its bos_token_id")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, config.bos_token_id)]
        )
    return Tokenizer(backend, bos_id=config.bos_token_id, eos_ids=config.eos_token_ids)


def _adds_bos(file: GgufFile) -> bool:
    """Whether raw prompts begin with the beginning-of-sequence token; old files leave it to the tokenizer's kind."""
    by_kind = file.metadata.get("tokenizer.ggml.model") == "llama" or _pre(file) in _LLAMA3
    return file.get("tokenizer.ggml.add_bos_token", bool, by_kind)


def _pre(file: GgufFile) -> str:
    return file.get("tokenizer.ggml.pre", str, "default")


def _byte_level(file: GgufFile) -> tokenizers.Tokenizer:
    pairs = (merge.partition(" ") for merge in file.list_of("tokenizer.ggml.merges", str))
    merges = [(left, right) for left, _, right in pairs]
    pre = _pre(file)
    backend = _bpe(file, _vocab(file), merges, ignore_merges=pre in _LLAMA3)
    backend.decoder = decoders.ByteLevel()
    if pre in _GPT2:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre in _SMOLLM:
        # Digits apart first: its merges were learned so. It shows on runs of spaces before a number.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre in _LLAMA3 or pre in _QWEN2:
        words = Regex(_LLAMA3_WORDS if pre in _LLAMA3 else _QWEN2_WORDS)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if pre in _QWEN2:
            backend.normalizer = normalizers.NFC()
    else:
        supported = ", ".join((*_GPT2, *_SMOLLM, *_LLAMA3, *_QWEN2))
        raise ModelError(f"the pre-tokenizer {pre!r} of {file.path} is not supported; supported are {supported}")
    return backend


def _sentencepiece(file: GgufFile) -> tokenizers.Tokenizer:
    tokens = file.list_of("tokenizer.ggml.tokens", str)
    scores = file.list_of("tokenizer.ggml.scores", float)
    unknown = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    if len(scores) != len(tokens) or unknown >= len(tokens):
        raise ModelError(f"the tokenizer of {file.path} is damaged: its tokens and scores do not match")
    vocab = _vocab(file)
    backend = _bpe(file, vocab, _merges(vocab, scores), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    spaces = normalizers.Replace(" ", "▁")
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        # A space before every stretch of text between special tokens, as sentencepiece and llama.cpp do.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _vocab(file: GgufFile) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(file.list_of("tokenizer.ggml.tokens", str))}


def _bpe(file: GgufFile, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library has no narrower one
        raise ModelError(f"the tokenizer of {file.path} is damaged: {error}") from error


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Sentencepiece merges whichever neighbours form the piece of the highest score; as a list of pairs, best first, every
    way to split a piece in two counts.  Shorter left sides go last among equals, as in transformers' conversion."""
    found = [
        (scores[token_id], left, piece[len(left) :])
        for piece, token_id in vocab.items()
        for left in (piece[:cut] for cut in range(1, len(piece)))
        if left in vocab and piece[len(left) :] in vocab
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_written_tokens(backend: tokenizers.Tokenizer, file: GgufFile, *, byte_level: bool) -> None:
    """Control and user-defined tokens are found whole wherever they are written in a text."""
    tokens = file.list_of("tokenizer.ggml.tokens", str)
    kinds = file.list_of("tokenizer.ggml.token_type", int, [])
    alphabet = byte_of_letter().keys()
    control, user_defined = [], []
    for token, kind in zip(tokens, kinds, strict=False):
        # Some converters mark ordinary byte-level pieces as control by mistake; theirs are spelled outside the alphabet.
        if kind == _CONTROL and not (byte_level and not alphabet >= set(token)):
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            user_defined.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(user_defined)
