from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.directory import library
from services.directory.__main__ import serve
from services.directory.build import INDEX
from services.directory.config import DirectoryConfig
from services.runtime import shared_library
from services.runtime.startup import StartupError


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared_library, "BUILD", tmp_path / "build")
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.usefixtures("nothing_built")
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = INDEX.build()
    assert path.exists()
    monkeypatch.setenv("CC", "false")
    assert INDEX.build() == path
    library.load()


@pytest.mark.usefixtures("nothing_built")
async def test_a_directory_without_a_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(StartupError, match="apt-get install gcc"):
        await serve(DirectoryConfig(listen="127.0.0.1:0"))


@pytest.mark.usefixtures("nothing_built")
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(library.IndexUnavailable, match="compiling the block index failed"):
        library.load()
