"""Generates the Python stubs under kvferry/api from protos/.  With --check: fails when the committed ones differ."""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(into: Path) -> None:
    sources = sorted((ROOT / "protos/kvferry").rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    plugins = [f"--{name}_out={into}" for name in ("python", "grpc_python", "mypy", "mypy_grpc")]
    arguments = ["protoc", f"-I{ROOT / 'protos'}", f"-I{well_known}", *plugins, *map(str, sources)]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed: see its message above")


def stubs(under: Path) -> set[Path]:
    return {p.relative_to(under) for p in (under / "kvferry/api").rglob("*") if p.name.endswith(SUFFIXES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed stubs instead of writing them")
    if not parser.parse_args().check:
        generate(ROOT)
        print(f"wrote {len(stubs(ROOT))} files under kvferry/api")
        return
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        new, old = stubs(Path(fresh)), stubs(ROOT)
        differing = [p for p in new & old if not filecmp.cmp(Path(fresh) / p, ROOT / p, shallow=False)]
        stale = sorted(map(str, [*(new ^ old), *differing]))
    if stale:
        sys.exit(f"stubs differ from protos/: {', '.join(stale)}; run `make protos` and commit the result")
    print(f"{len(new)} stubs match protos/")


if __name__ == "__main__":
    main()
