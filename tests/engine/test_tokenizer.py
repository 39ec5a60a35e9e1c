from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvferry import errors
from services.engine import gguf_checkpoint, gguf_tokenizer
from services.engine.gguf_file import GgufFile
from services.engine.model_config import ModelError
from services.engine.model_files import ModelFiles
from services.engine.tokenizer import Tokenizer, byte_of_letter

TEXTS = [
    "Hello world",
    " leading, trailing ",
    "tabs\tand\nnewlines\r\n\n\n",
    "many      spaces   between",
    "12345 6.78e-9 １２３",
    "don't we'll I'M they'RE",
    "naïve façade — “quotes” … €",
    "日本語のテキスト 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 🚢🇩🇰 e\u0301 \u200b\ufeff",
    "def f(x):\n    return x[::-1] if x else {}  # comment\n",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|> <|im_end|><|endoftext|>x<repo_name> <|im_start |>",
    "",
    "\x00\x01\x7f",
    "a" * 300,
]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_encodes_as_transformers_does(text: str, smollm2: ModelFiles, reference_tokenizer: Any) -> None:
    ids = smollm2.tokenizer.encode(text, add_special=True)
    assert ids == reference_tokenizer(text).input_ids
    assert smollm2.tokenizer.decode(ids) == reference_tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def digits_apart(reference_tokenizer: Any) -> tokenizers.Tokenizer:
    """transformers' tokenizer for this file, but with digits split off as the model's own tokenizer.json says: the GGUF
    says so too (pre = smollm), only that transformers does not look."""
    backend = tokenizers.Tokenizer.from_str(reference_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    return backend


@pytest.mark.parametrize("text", [*TEXTS, "list:\n  1. one\n  2. two", "x  =   10", "\t\t5", "½ Ⅷ ½"])
def test_smollm2_splits_digits_off(text: str, smollm2: ModelFiles, digits_apart: tokenizers.Tokenizer) -> None:
    assert smollm2.tokenizer.encode(text, add_special=True) == digits_apart.encode(text).ids


@given(text=st.text(max_size=60))
@example(text="a  1")
def test_any_text_comes_back(text: str, smollm2: ModelFiles, digits_apart: tokenizers.Tokenizer) -> None:
    ids = smollm2.tokenizer.encode(text, add_special=False)
    assert ids == digits_apart.encode(text).ids
    # Its vocabulary lacks a few bytes that hardly ever occur; the model's own tokenizer drops them too.
    if all(smollm2.tokenizer.token_id(letter) is not None for letter in letters(text)):
        assert smollm2.tokenizer.decode(ids) == text


def test_half_a_surrogate_pair_is_the_requests_error(smollm2: ModelFiles) -> None:
    with pytest.raises(errors.InvalidRequestError, match="surrogate"):
        smollm2.tokenizer.encode("a\ud800", add_special=True)


def letters(text: str) -> set[str]:
    spelled = {byte: letter for letter, byte in byte_of_letter().items()}
    return {spelled[byte] for byte in text.encode()}


def test_any_tokens_decode_as_transformers_does(smollm2: ModelFiles, reference_tokenizer: Any) -> None:
    generator = random.Random(5)
    for _ in range(200):
        ids = [generator.randrange(smollm2.config.vocab_size) for _ in range(12)]
        expected = reference_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert smollm2.tokenizer.decode(ids) == expected


def test_special_and_unknown_tokens_have_no_bytes(smollm2: ModelFiles) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.eos_ids == {2}
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (1, 49152)
    assert tokenizer.token(2) == "<|im_end|>"
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_bytes(10**6) == b""
    assert not tokenizer.strips_leading_space


def test_a_character_may_span_tokens(smollm2: ModelFiles) -> None:
    ids = smollm2.tokenizer.encode("🦑", add_special=False)
    parts = [smollm2.tokenizer.token_bytes(token_id) for token_id in ids]
    assert len(parts) > 1
    assert b"".join(parts) == "🦑".encode()


# transformers adds GPT-2's <|endoftext|> to every byte-level vocabulary; a file without it has none.
PLAIN_TEXTS = [text for text in TEXTS if "<|endoftext|>" not in text]
CORPUS = ["the cat sat on the mat, and the other cat sat too", "12 cats in 2024!", "naïve ünïcode … it's"] * 20


def byte_level_gguf(path: Path, pre: str, **fields: Any) -> GgufFile:
    """A file with a trained vocabulary: 2 control tokens, one user-defined one, then byte-level pieces."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|bos|>", "<|end|>", "<think>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    vocab = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    import json

    merges = [" ".join(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3, 3, 4] + [1] * (len(vocab) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    return finish(writer, path)


def finish(writer: Any, path: Path) -> GgufFile:
    import numpy as np

    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((420, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def read(file: GgufFile) -> Tokenizer:
    return gguf_tokenizer.read_tokenizer(file, gguf_checkpoint.read_config(file, "tiny"))


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2", "default"])
@pytest.mark.parametrize("text", [*PLAIN_TEXTS, *CORPUS[:3], "<|bos|>the<think> cat</think><|end|>", "1234567 CAN'T"])
def test_gguf_byte_level_kinds_encode_as_transformers_does(pre: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    tokenizer = read(byte_level_gguf(path, pre, add_bos_token=False))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    if pre == "qwen2":  # its tokenizer.json normalizes, which transformers forgets when it reads GGUF
        import unicodedata

        expected = reference(unicodedata.normalize("NFC", text)).input_ids
    else:
        expected = reference(text).input_ids
    assert tokenizer.encode(text, add_special=False) == expected


def test_bos_is_added_when_the_file_or_its_kind_says_so(tmp_path: Path) -> None:
    asked = read(byte_level_gguf(tmp_path / "a.gguf", "qwen2", add_bos_token=True))
    assert asked.encode("cat", add_special=True) == [0, *asked.encode("cat", add_special=False)]
    by_kind = read(byte_level_gguf(tmp_path / "b.gguf", "llama-bpe"))
    assert by_kind.encode("cat", add_special=True)[0] == 0
    neither = read(byte_level_gguf(tmp_path / "c.gguf", "qwen2"))
    assert neither.encode("cat", add_special=True)[0] != 0


def test_user_defined_tokens_are_whole_and_have_bytes(tmp_path: Path) -> None:
    tokenizer = read(byte_level_gguf(tmp_path / "a.gguf", "qwen2"))
    assert tokenizer.encode("<think>", add_special=False) == [2]
    assert tokenizer.token_bytes(2) == b"<think>"


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'novel'"):
        read(byte_level_gguf(tmp_path / "a.gguf", "novel"))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("merges", ["a nowhere"], "is damaged: .*out of vocabulary"),
        ("merges", ["alone"], "is damaged"),
        ("merges", [1], "merges of the model file .* is no list of str"),
        ("tokens", [1, 2], "tokens of the model file .* is no list of str"),
        ("token_type", ["3"], "token_type of the model file .* is no list of int"),
    ],
)
def test_a_damaged_vocabulary_is_refused(field: str, value: list[Any], said: str, tmp_path: Path) -> None:
    file = byte_level_gguf(tmp_path / "a.gguf", "qwen2")
    file.metadata[f"tokenizer.ggml.{field}"] = value
    with pytest.raises(ModelError, match=said):
        read(file)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A vocabulary as Llama 2's is built, ours and transformers'."""
    path = tmp_path_factory.mktemp("spm") / "tiny.gguf"
    pieces = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "▁s", "▁sat", "▁▁", "in", "▁in", "it", "ïv", "▁o", "▁on", "s▁"]
    letters = sorted(set("".join(CORPUS).replace(" ", "▁")) - {"…"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    file = finish(writer, path)
    return read(file), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize(
    "text", ["the cat sat on the mat", "cats  in 2024!", "naïve… 日本 🚢", "x", "the\nthe", "it's▁"]
)
def test_sentencepiece_encodes_as_transformers_does(text: str, sentencepiece: tuple[Tokenizer, Any]) -> None:
    tokenizer, reference = sentencepiece
    ids = tokenizer.encode(text, add_special=True)
    assert ids == reference(text).input_ids
    assert ids[0] == tokenizer.bos_id == 1
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_strips_the_space_at_the_beginning_only(sentencepiece: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = sentencepiece
    ids = tokenizer.encode("the cat", add_special=False)
    assert tokenizer.strips_leading_space
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" the cat"
    assert tokenizer.decode(ids) == "the cat"
    # As sentencepiece itself does, and unlike transformers: the space is put there even before a space.
    assert tokenizer.decode(tokenizer.encode("  the", add_special=False)) == "  the"


def test_sentencepiece_starts_a_word_after_a_special_token(sentencepiece: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = sentencepiece
    assert tokenizer.encode("<s>the", add_special=False) == [1, *tokenizer.encode("the", add_special=False)]


def test_a_decoder_of_another_kind_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer(backend, bos_id=None, eos_ids=())
