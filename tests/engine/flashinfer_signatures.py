"""The package's signatures, read from its source, so that neither a GPU nor its libraries are needed.

`python -m tests.engine.flashinfer_signatures FOLDER` prints those of a package that is installed there, as the JSON beside
this file holds them."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
DECODE, PREFILL = "BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"
# Where each is defined; what follows the colon is where its keywords are, for one hands them on.
USED = {
    f"{PREFILL}.__init__": "prefill.py",
    f"{PREFILL}.plan": "prefill.py",
    f"{PREFILL}.run": "prefill.py",
    f"{DECODE}.__init__": "decode.py",
    f"{DECODE}.plan": f"decode.py:{DECODE}._plan_impl",
    f"{DECODE}.run": "decode.py",
    "append_paged_kv_cache": "page.py",
    "rmsnorm": "norm/__init__.py",
    "fused_add_rmsnorm": "norm/__init__.py",
    "silu_and_mul": "activation.py",
    "apply_rope_with_cos_sin_cache_inplace": "rope.py",
    "top_k": "topk.py",
}

Signature = dict[str, list[str]]


def read(package: Path) -> dict[str, Signature]:
    """Of every name used: its ``positional`` parameters in order, those that have no default (``required``), and the
    ``keywords`` that can be given by name alone."""
    found = {}
    for name, where in USED.items():
        file, _, keywords_of = where.partition(":")
        tree = ast.parse((package / file).read_text(encoding="utf-8"))
        found[name] = _signature(_definition(tree, name))
        if keywords_of:
            found[name]["keywords"] = _signature(_definition(tree, keywords_of))["keywords"]
    return found


def signature_of(source: str, name: str) -> Signature:
    return _signature(_definition(ast.parse(source), name))


def _definition(tree: ast.AST, name: str) -> ast.FunctionDef:
    """The last one of that name: those before are overloads."""
    for part in name.split("."):
        (*_, tree) = [n for n in ast.iter_child_nodes(tree) if getattr(n, "name", None) == part]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def _signature(definition: ast.FunctionDef) -> Signature:
    arguments = definition.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args) if a.arg != "self"]
    num_defaults = len(arguments.defaults)
    required = positional[: len(positional) - num_defaults]
    return {"positional": positional, "required": required, "keywords": [a.arg for a in arguments.kwonlyargs]}


def record(package: Path) -> str:
    """The name of the version and, under it, what ``read`` finds."""
    for info in package.parent.glob("flashinfer_python-*.dist-info"):
        return info.name.removeprefix("flashinfer_python-").removesuffix(".dist-info")
    raise FileNotFoundError(f"{package} was not installed by pip")


if __name__ == "__main__":
    folders = [Path(argument) / "flashinfer" for argument in sys.argv[1:]]
    print(json.dumps({record(folder): read(folder) for folder in folders}, indent=1, sort_keys=True))  # noqa: T201
