"""FlashInfer's compiled kernels, from a machine that compiled them to one that need not.

It loads data/aot/NAME/NAME.so of its own package before it compiles anything, and looks at the name alone: which version
and device a module is for is held to here."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.gpu_kit.packages import KitError


def modules_in(workspace: Path, version: str) -> list[tuple[str, Path]]:
    """(name in the kit, path) of what lies in ``workspace``, FlashInfer's .cache/flashinfer/VERSION/ARCHITECTURE.  Raises
    KitError where there is nothing, or of another version than ``version``."""
    found = sorted(path for path in workspace.glob("cached_ops/*/*.so") if path.stem == path.parent.name)
    if not found:
        raise KitError(
            f"no modules in {workspace}: name a folder .cache/flashinfer/VERSION/ARCHITECTURE, with cached_ops"
        )
    of = workspace.resolve().parent.name
    if of != version:
        raise KitError(f"the modules in {workspace} are of FlashInfer {of}, the kit takes {version}")
    return [(f"modules/{version}/{workspace.resolve().name}/{path.name}", path) for path in found]


def place(modules: Path, package: Path, version: str, capability: tuple[int, int] | None) -> str:
    """Copies the modules in ``modules``, as the kit holds them, that are for FlashInfer ``version`` and a device of
    ``capability`` into FlashInfer's ``package``; says in a line what it did."""
    folders = sorted(modules.glob("*/*"))
    if not folders:
        return "none in the kit: FlashInfer compiles what it uses at first use, with nvcc"
    if capability is None:
        return "left out: no GPU is seen here"
    device = f"{capability[0]}{capability[1]}"
    placed = 0
    for folder in folders:
        if folder.parent.name == version and folder.name.rstrip("af") == device:
            for path in folder.glob("*.so"):
                target = package / "data" / "aot" / path.stem / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                placed += 1
    if not placed:
        held = ", ".join(f"{folder.parent.name} for {folder.name}" for folder in folders)
        return f"left out: they are of FlashInfer {held}; here it is {version} for {device}"
    return f"{placed} placed, which FlashInfer need not compile"
