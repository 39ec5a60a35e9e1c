"""What the commands leave behind, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.cli import output
from kvferry.errors import InvalidRequestError


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"nowhere/out\.json cannot be written: No such file"):
        output.write_file(tmp_path / "nowhere" / "out.json", "{}")
