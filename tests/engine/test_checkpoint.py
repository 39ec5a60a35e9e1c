from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from services.engine.checkpoint import locate, model_name
from services.engine.gguf_file import GgufFile
from services.engine.hf_checkpoint import weight_files
from services.engine.model_config import ModelError
from services.engine.model_files import ModelFiles, open_model
from services.engine.weights import load_weights


def test_smollm2_is_read(smollm2: ModelFiles) -> None:
    config = smollm2.config
    assert config.name == "smollm2-135m-instruct"
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.context_length, config.vocab_size, config.tied_embeddings) == (8192, 49152, True)
    assert open_model(str(smollm2.path)).config.revision == config.revision


def test_reading_a_model_needs_no_torch() -> None:
    code = (
        "import sys; from services.engine.model_files import open_model; open_model('smollm2-135m-instruct');"
        "sys.exit(bool({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_progress_ends_at_one(smollm2: ModelFiles) -> None:
    shares: list[float] = []
    load_weights(smollm2.config, smollm2.path, "bfloat16", shares.append)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert len(shares) > 10


def test_another_type_is_refused(smollm2: ModelFiles) -> None:
    with pytest.raises(ModelError, match="float64"):
        load_weights(smollm2.config, smollm2.path, "float64")


@pytest.mark.parametrize("name", ["nowhere.gguf", "no/such.gguf", "smollm", "../x/y", "http://host/x"])
def test_what_is_not_there_is_told(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        locate(name)


def test_other_files_and_directories_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate(str(tmp_path))
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match=r"no \.gguf file"):
        locate(str(tmp_path / "model.bin"))


def test_a_missing_default_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install"):
        locate("smollm2-135m-instruct")


def test_an_id_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/name-1.5") == tmp_path
    assert asked["repository"] == "owner/name-1.5"
    assert not any("bin" in pattern or "pt" in pattern.split(".")[-1] for pattern in asked["patterns"])
    assert model_name("owner/name-1.5") == "owner/name-1.5"


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError) as caught:
        locate("owner/name")
    assert "no route to host" in caught.value.message
    assert "\n" not in caught.value.message


def test_damaged_gguf_files_are_refused(smollm2: ModelFiles, tmp_path: Path) -> None:
    with smollm2.path.open("rb") as file:
        head = file.read(100_000)
    for content in (b"", b"GGUF", b"NOPE" + head[4:], head, head[:4] + b"\x09" + head[5:]):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError):
            GgufFile(path)


def test_the_revision_follows_every_tensor(smollm2: ModelFiles, tmp_path: Path) -> None:
    file = GgufFile(smollm2.path)
    path = tmp_path / "changed.gguf"
    path.write_bytes(smollm2.path.read_bytes())
    with path.open("r+b") as changed:
        changed.seek(file.tensors["blk.17.ffn_up.weight"].offset)
        changed.write(b"\x00\x01\x02\x03")
    assert GgufFile(path).fingerprint != file.fingerprint


def test_a_hugging_face_directory_brings_words_and_template(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, bos_token_id=256)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
    )
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 3]}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "old"}]})
    )
    files = open_model(str(tmp_path))
    assert files.config.name == tmp_path.name
    assert files.tokenizer.eos_ids == {3, 257}
    ids = files.tokenizer.encode("höi there", add_special=True)
    assert ids[0] == 256
    assert files.tokenizer.decode(ids) == "höi there"
    assert files.chat_template.render([]) == "old"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}new")
    changed = open_model(str(tmp_path))
    assert changed.chat_template.render([]) == "<s>new"
    assert changed.config.revision != files.config.revision
    panicking = json.loads((tmp_path / "tokenizer.json").read_text())
    panicking["model"] |= {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}  # the merge has no token
    (tmp_path / "tokenizer.json").write_text(json.dumps(panicking))
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        open_model(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("name", ["m" * 300, "model-\ud800.safetensors", "model-2.safetensors"])
def test_a_weight_file_that_an_index_names_and_nobody_has_is_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"lacks (m{64}|model-.*safetensors); download"):
        weight_files(tmp_path)
