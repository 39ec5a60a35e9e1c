"""Where a worker runs, in its operator's words.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_LABELS = 32
_NAME = re.compile(r"[a-z0-9]([-a-z0-9_./]{0,61}[a-z0-9])?")
_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.:/]{0,126}[A-Za-z0-9])?")


def parse_labels(pairs: Iterable[str]) -> dict[str, str]:
    """Of "name=value" each.  Raises ValueError."""
    labels: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"{pair!r} is no label; write one like zone=a, in letters, digits and -_./")
        if labels.setdefault(name, value) != value:
            raise ValueError(f"{name} is said to be {labels[name]} and {value}; give one value")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{len(labels)} labels are too many; give at most {MAX_LABELS}")
    return labels
