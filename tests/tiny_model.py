"""A random model with words of one byte: nine heads, three KV heads, quick to load in many processes."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

VOCABULARY = 259


def save_tiny_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=144, intermediate_size=112, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for every part to show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
