"""Tensors from the safetensors files of a Hugging Face directory, sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch

from services.engine.hf_checkpoint import weight_files
from services.engine.model_config import ModelError


class SafetensorsTensors:
    """A ``TensorSource`` over mapped files; the mappings live as long as this object."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of: dict[str, Any] = {}
        for path in weight_files(directory):
            try:
                file: Any = safetensors.safe_open(path, framework="pt")
                names: list[str] = list(file.keys())
            except (OSError, safetensors.SafetensorError) as error:
                raise ModelError(f"{path} is damaged ({error}); download it again") from error
            self._file_of |= dict.fromkeys(names, file)

    def read(self, name: str) -> torch.Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"the weights in {self._directory} lack the tensor {name}; they are incomplete")
        tensor: torch.Tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"the tensor {name} in {self._directory} is {tensor.dtype}, which is not supported")
        return tensor
