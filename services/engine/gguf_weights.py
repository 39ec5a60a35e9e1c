"""Tensors from a GGUF file: dequantized, and in the order of rows that Hugging Face has."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch

from services.engine.gguf_file import GgufFile, GgufTensor
from services.engine.model_config import ModelConfig, ModelError

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufTensors:
    """A ``TensorSource`` over a mapped file; the mapping lives as long as this object."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = GgufFile(path)
        self._data = np.memmap(path, mode="r")
        # llama.cpp rotates neighbouring pairs where Hugging Face rotates halves, so files of its llama architecture have
        # the rows of queries and keys reordered within each head; qwen2 files do not.
        self._permuted = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        if config.architecture != "llama":
            self._permuted = {}

    def read(self, name: str) -> torch.Tensor:
        own_name = _own_name(name)
        tensor = self._file.tensors.get(own_name)
        if tensor is None:
            raise ModelError(f"the model file {self._file.path} lacks the tensor {own_name}; it is incomplete")
        values = self._dequantized(tensor)
        num_heads = next((heads for part, heads in self._permuted.items() if f".{part}." in own_name), None)
        if num_heads is not None:
            half = values.shape[0] // num_heads // 2
            values = values.reshape(num_heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def _dequantized(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        path = self._file.path
        try:
            kind = gguf.GGMLQuantizationType(tensor.ggml_type)
        except ValueError as error:
            raise ModelError(f"the tensor {tensor.name} of {path} is of an unknown type {tensor.ggml_type}") from error
        block_size, block_nbytes = gguf.GGML_QUANT_SIZES[kind]
        row_nbytes, odd = divmod(tensor.shape[-1] * block_nbytes, block_size)
        num_rows = math.prod(tensor.shape[:-1])
        end = tensor.offset + num_rows * row_nbytes
        if odd or end > self._file.nbytes:
            raise ModelError(f"the model file {path} ends early or is damaged at {tensor.name}; download it again")
        rows = self._data[tensor.offset : end].reshape(num_rows, row_nbytes)
        try:
            values: npt.NDArray[np.float32] = gguf.dequantize(rows, kind)
        except NotImplementedError as error:
            raise ModelError(f"the quantization {kind.name} of {path} is not supported; use another one") from error
        return np.asarray(values).reshape(tensor.shape)


def _own_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    match = _LAYER_NAME.fullmatch(name)
    assert match is not None, name
    return f"blk.{match[1]}.{_OF_LAYER[match[2]]}.{match[3]}"
