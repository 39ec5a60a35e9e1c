"""The header of a GGUF file: metadata and where each tensor lies.

The ``gguf`` package's reader makes a numpy object of every string, which takes five seconds for a vocabulary of 49,000
tokens; this one takes a tenth of a second, and needs neither numpy nor torch.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.engine.model_config import ModelError

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SAMPLE_NBYTES = 4096

T = TypeVar("T", str, int, float, bool, list)  # type: ignore[type-arg]  # lists are asked for as a whole
S = TypeVar("S", str, int, float)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """``shape`` is row-major (GGUF writes it the other way round), ``ggml_type`` a GGMLQuantizationType's number,
    ``offset`` the first byte within the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GgufFile:
    """A parsed header.  Reads the file once, when made, and keeps nothing open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._parse(data)
        except OSError as error:
            raise ModelError(f"the model file {path} cannot be read: {error.strerror or error}") from error
        except (struct.error, UnicodeDecodeError, ValueError, IndexError, KeyError) as error:
            raise ModelError(f"the model file {path} is damaged or no GGUF file; download it again") from error

    def _parse(self, data: mmap.mmap) -> None:
        if data[:4] != _MAGIC:
            raise ValueError("magic")
        version, num_tensors, num_fields = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ModelError(f"the model file {self.path} is GGUF version {version}; versions 2 and 3 are supported")
        cursor = _Cursor(data, 24)
        self.metadata: dict[str, Value] = {}
        for _ in range(num_fields):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        raw = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.scalar("I")
            dims, ggml_type, offset = cursor.scalars("Q", num_dims), cursor.scalar("I"), cursor.scalar("Q")
            raw.append((name, tuple(int(d) for d in reversed(dims)), int(ggml_type), int(offset)))
        alignment = int(self.get("general.alignment", int, 32))
        if alignment < 1:
            raise ValueError("alignment")
        start = -(-cursor.offset // alignment) * alignment
        self.tensors = {name: GgufTensor(name, shape, kind, start + offset) for name, shape, kind, offset in raw}
        self.nbytes = len(data)
        if any(tensor.offset >= self.nbytes for tensor in self.tensors.values()):
            raise ValueError("a tensor lies beyond the end")
        self.fingerprint = self._fingerprint(data, cursor.offset)

    def _fingerprint(self, data: mmap.mmap, header_nbytes: int) -> str:
        """The whole header (which holds the tokenizer), the size, and a sample from the start and the middle of every
        tensor: another fine-tune of the same model shows in any of its tensors."""
        digest = hashlib.sha256(data[:header_nbytes])
        digest.update(self.nbytes.to_bytes(8, "little"))
        offsets = sorted(tensor.offset for tensor in self.tensors.values())
        for offset, end in zip(offsets, [*offsets[1:], self.nbytes], strict=True):
            middle = (offset + end) // 2
            digest.update(data[offset : min(offset + _SAMPLE_NBYTES, end)])
            digest.update(data[middle : min(middle + _SAMPLE_NBYTES, end)])
        return digest.hexdigest()

    def floats(self, name: str) -> tuple[float, ...]:
        """A small float32 tensor's numbers."""
        tensor = self.tensors[name]
        if tensor.ggml_type != 0:
            raise ModelError(f"the tensor {name} of {self.path} is not float32")
        count = 1
        for size in tensor.shape:
            count *= size
        if tensor.offset + 4 * count > self.nbytes:
            raise ModelError(f"the model file {self.path} ends early; download it again")
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            raw = file.read(4 * count)
        return struct.unpack(f"<{count}f", raw)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The metadata at ``key``; without a default, ModelError when it is missing."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"the model file {self.path} lacks {key}, which kvferry needs")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise ModelError(f"{key} of the model file {self.path} is no {kind.__name__}")
        return value

    def list_of(self, key: str, kind: type[S], default: list[S] | None = None) -> list[S]:
        """The list at ``key``, as ``get`` does."""
        values = self.get(key, list, default)
        if not all(isinstance(value, kind) for value in values):
            raise ModelError(f"{key} of the model file {self.path} is no list of {kind.__name__}")
        return values


class _Cursor:
    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self._data = data
        self.offset = offset

    def scalars(self, code: str, count: int) -> list[Scalar]:
        form = struct.Struct(f"<{count}{code}")
        values = form.unpack_from(self._data, self.offset)
        self.offset += form.size
        return list(values)

    def scalar(self, code: str) -> int:
        value = self.scalars(code, 1)[0]
        assert isinstance(value, int)
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        data, offset = self._data, self.offset
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = offset + 8
            offset = start + unpack(data, offset)[0]
            if offset > len(data):
                raise ValueError("a string beyond the end")
            found.append(data[start:offset].decode("utf-8"))
        self.offset = offset
        return found

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(_SCALARS[kind], 1)[0]
        item_kind, count = self.scalar("I"), self.scalar("Q")
        if item_kind == _STRING:
            return list[Scalar](self.strings(count))
        if count > len(self._data):
            raise ValueError("an array beyond the end")
        return self.scalars(_SCALARS[item_kind], count)
