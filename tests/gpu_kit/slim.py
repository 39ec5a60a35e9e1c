"""Wheels without what nothing here uses: each MiB travels."""

from __future__ import annotations

import csv
import io
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

# UCX's wheel has every library as three files, and a fourth to link statically.  Its loader, and the binding, take those
# that end in .so.0.
UNUSED = {
    "libucx-cu13": (
        "*.a",
        "*.so",
        "*.so.0.0.0",
        "*/share/*",
        "*/bin/io_demo",
        "*/bin/ucx_perftest*",
        "*libucx_perftest*",
    ),
}


def slim(wheel: Path, unused: tuple[str, ...], folder: Path) -> Path:
    """A wheel of the same name in ``folder``, without files that match one of ``unused``; each time the same."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / wheel.name
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(target, "w") as slimmed:
        for entry in whole.infolist():
            if _matches(entry.filename, unused):
                continue
            data = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data = _record(data.decode(), unused).encode()
            slimmed.writestr(entry, data)
    return target


def _record(text: str, unused: tuple[str, ...]) -> str:
    out = io.StringIO()
    rows = (row for row in csv.reader(io.StringIO(text)) if row and not _matches(row[0], unused))
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
