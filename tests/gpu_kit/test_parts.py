"""Parts, what joins them, and where FlashInfer finds kernels that were compiled elsewhere."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.gpu_kit.check import USED
from tests.gpu_kit.modules import modules_in, place
from tests.gpu_kit.packages import KitError
from tests.gpu_kit.parts import manifest_of, write_parts
from tests.gpu_kit.slim import slim

ROOT = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MOST = 50_000


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, Path]]:
    """One of them larger than two parts."""
    made = []
    for name, nbytes in (("wheels/a.whl", 300), ("wheels/b.whl", 120_000), ("wheels/empty.whl", 0)):
        path = tmp_path / Path(name).name
        path.write_bytes(os.urandom(nbytes))
        made.append((name, path))
    return made


def test_parts_joined_are_the_files(files: list[tuple[str, Path]], tmp_path: Path) -> None:
    parts = write_parts(files, tmp_path / "kit", MOST)
    data = [(tmp_path / "kit" / part.name).read_bytes() for part in parts]
    assert [part.nbytes for part in parts] == [len(piece) for piece in data]
    assert all(piece == MOST for piece in map(len, data[:-1]))
    assert 0 < len(data[-1]) <= MOST
    assert [part.sha256 for part in parts] == [hashlib.sha256(piece).hexdigest() for piece in data]
    with tarfile.open(fileobj=io.BytesIO(b"".join(data))) as archive:
        assert archive.getnames() == [name for name, _ in files]
        for name, path in files:
            member = archive.extractfile(name)
            assert member is not None
            assert member.read() == path.read_bytes()


def test_the_same_files_give_the_same_parts_and_none_of_before_stays(
    files: list[tuple[str, Path]], tmp_path: Path
) -> None:
    kit = tmp_path / "kit"
    first = write_parts(files, kit, MOST)
    for _, path in files:
        os.utime(path, (0, 0))
    assert write_parts(files, kit, MOST) == first
    write_parts(files[:1], kit, 1_000_000)
    assert [path.name for path in kit.glob("part-*")] == ["part-1"]


def write_wheel(folder: Path, name: str, package: str, source: str, requires: str = "") -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/__init__.py", source)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit of several parts in a clone, for this Python; of packages it holds a FlashInfer without kernels, and one that
    this Python does not have."""
    clone = tmp_path / "clone"
    kit = clone / "build" / "gpu-kit"
    kit.mkdir(parents=True)
    for entry in ("kvferry", "gateway", "services", "transport", "tests", "pyproject.toml"):
        (clone / entry).symlink_to(ROOT / entry)
    for library in (ROOT / "build").glob("*.so"):
        (clone / "build" / library.name).symlink_to(library)
    names = "".join(f"{name} = '1.0'\n" for name in (*USED, "__version__"))
    paths = [
        write_wheel(tmp_path, "flashinfer_python", "flashinfer", names),
        write_wheel(tmp_path, "kit_probe", "kit_probe", f"FILLING = {os.urandom(60_000).hex()!r}\n"),
    ]
    held = [(f"wheels/{path.name}", path) for path in paths]
    parts = write_parts(held, kit, MOST)
    assert len(parts) > 2
    (kit / "manifest").write_text(manifest_of(parts, PYTHON, [(name, path.stat().st_size) for name, path in held]))
    shutil.copy(ROOT / "tests/gpu_kit/install.sh", kit)
    return kit


def test_a_slim_wheel_lacks_what_is_unused_and_does_not_list_it(tmp_path: Path) -> None:
    whole = write_wheel(tmp_path, "library", "library", "")
    with zipfile.ZipFile(whole, "a") as archive:
        for name in ("library/lib/libx.so", "library/lib/libx.so.0", "library/lib/libx.a"):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, name)
        archive.writestr(
            "library-2.dist-info/RECORD", "library/lib/libx.so,sha256=a,9\nlibrary/lib/libx.so.0,sha256=b,9\n"
        )
    made = slim(whole, ("*.a", "*.so"), tmp_path / "slim")
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        assert [name for name in names if "/lib/" in name] == ["library/lib/libx.so.0"]
        assert archive.read("library-2.dist-info/RECORD") == b"library/lib/libx.so.0,sha256=b,9\n"
        assert archive.getinfo("library/lib/libx.so.0").external_attr >> 16 == 0o100755
    assert slim(whole, ("*.a", "*.so"), tmp_path / "again").read_bytes() == made.read_bytes()


def install(kit: Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(
        [kit / "install.sh"], env=environment, capture_output=True, text=True, check=False, timeout=280
    )


def test_a_kit_installs_over_what_python_has_and_a_second_time_looks_alone(kit: Path) -> None:
    done = install(kit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "import all that they need" in done.stdout
    assert "FlashInfer 1.0" in done.stdout
    assert "make test-gpu PYTHON=build/gpu-kit/venv/bin/python" in done.stdout
    probe = "import kit_probe, torch, kvferry; print(kit_probe.__file__)"
    where = subprocess.run([kit / "venv/bin/python", "-c", probe], cwd="/", capture_output=True, text=True, check=True)
    assert where.stdout.startswith(str(kit / "venv"))
    for part in kit.glob("part-*"):
        part.unlink()
    again = install(kit)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "installed already" in again.stdout


def test_parts_that_are_missing_cut_or_damaged_are_named(kit: Path) -> None:
    nbytes = (kit / "part-1").stat().st_size
    (kit / "part-1").unlink()
    (kit / "part-2").write_bytes((kit / "part-2").read_bytes()[:-1])
    (kit / "part-3").write_bytes(bytes((kit / "part-3").stat().st_size))
    done = install(kit)
    assert done.returncode == 1
    assert f"part-1 is missing, {nbytes} bytes; part-2 has {MOST - 1} bytes instead of {MOST}" in done.stderr
    assert "part-3 is damaged" in done.stderr
    assert not (kit / "venv").exists()


def test_a_kit_for_another_python_is_refused(kit: Path) -> None:
    text = (kit / "manifest").read_text()
    (kit / "manifest").write_text(text.replace(f"python {PYTHON}", "python 3.99"))
    done = install(kit)
    assert done.returncode == 1
    assert f"for Python 3.99, {sys.executable} is {PYTHON}" in done.stderr


def test_a_python_without_torch_is_refused(kit: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True, timeout=60)
    done = install(kit, bare / "bin/python")
    assert done.returncode == 1
    assert "has no torch" in done.stderr


def test_modules_go_where_flashinfer_looks_for_their_version_and_device_alone(tmp_path: Path) -> None:
    workspace = tmp_path / ".cache/flashinfer/0.7.4/90a"
    for name, file in (("page", "page.so"), ("rope", "rope.so"), ("rope", "rope.cuda.o"), ("topk", "topk.cuda.o")):
        (workspace / "cached_ops" / name).mkdir(parents=True, exist_ok=True)
        (workspace / "cached_ops" / name / file).write_text(name)
    held = modules_in(workspace, "0.7.4")
    assert [name for name, _ in held] == ["modules/0.7.4/90a/page.so", "modules/0.7.4/90a/rope.so"]
    for name, path in held:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / name)
    package = tmp_path / "flashinfer"
    for version, capability in (("0.7.4", None), ("0.7.4", (8, 0)), ("0.7.2", (9, 0))):
        assert place(tmp_path / "modules", package, version, capability).startswith("left out")
    assert not package.exists()
    assert place(tmp_path / "modules", package, "0.7.4", (9, 0)).startswith("2 placed")
    assert (package / "data/aot/rope/rope.so").read_text() == "rope"
    assert place(tmp_path / "none", package, "0.7.4", (9, 0)).startswith("none")


def test_modules_of_another_version_or_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="no modules in"):
        modules_in(tmp_path, "0.7.4")
    (tmp_path / "0.7.2/90a/cached_ops/page").mkdir(parents=True)
    (tmp_path / "0.7.2/90a/cached_ops/page/page.so").touch()
    with pytest.raises(KitError, match=r"of FlashInfer 0\.7\.2, the kit takes 0\.7\.4"):
        modules_in(tmp_path / "0.7.2/90a", "0.7.4")
