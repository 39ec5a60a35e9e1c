"""Files as one archive, in parts that can travel one by one."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    nbytes: int
    sha256: str


class Splitter:
    """A file to write to: ``folder``/part-1, part-2 and so on, each of ``most_nbytes`` but the last."""

    def __init__(self, folder: Path, most_nbytes: int) -> None:
        self._folder = folder
        self._most_nbytes = most_nbytes
        self._held = bytearray()
        self.parts: list[Part] = []

    def write(self, data: bytes) -> int:
        self._held += data
        while len(self._held) > self._most_nbytes:
            self._end(self._most_nbytes)
        return len(data)

    def close(self) -> None:
        self._end(len(self._held))

    def _end(self, nbytes: int) -> None:
        data = bytes(self._held[:nbytes])
        del self._held[:nbytes]
        part = Part(f"part-{len(self.parts) + 1}", nbytes, hashlib.sha256(data).hexdigest())
        (self._folder / part.name).write_bytes(data)
        self.parts.append(part)


def write_parts(files: Sequence[tuple[str, Path]], folder: Path, most_nbytes: int) -> list[Part]:
    """A tar archive of ``files``, (name in it, path), in their order; the same files give the same parts.  Replaces those
    that lie in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*"):
        old.unlink()
    splitter = Splitter(folder, most_nbytes)
    with tarfile.open(fileobj=splitter, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for name, path in files:
            member = tarfile.TarInfo(name)
            member.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(member, file)
    splitter.close()
    return splitter.parts


def manifest_of(parts: Sequence[Part], python: str, contents: Sequence[tuple[str, int]]) -> str:
    """What install.sh reads: lines of a word and its values.  ``contents`` (name, bytes) are for people."""
    lines = [f"python {python}"]
    lines += [f"part {part.name} {part.nbytes} {part.sha256}" for part in parts]
    lines += [f"holds {name} {nbytes}" for name, nbytes in contents]
    return "\n".join(lines) + "\n"
