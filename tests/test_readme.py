"""README's table of faults names tests that there are, each by its fault's name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADING = "## How splitting fails in the field"


def rows() -> list[tuple[str, str, list[str]]]:
    """(class, tick, tests)."""
    section = (ROOT / "README.md").read_text().split(HEADING)[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return [(name, tick, re.findall("`([^`]+)`", tests)) for name, _, tick, tests in cells[2:]]


def functions_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_fault_has_a_test_of_its_name() -> None:
    found = rows()
    assert len(found) > 20
    for name, tick, named in found:
        slug = re.sub("[^a-z]+", "_", name.lower().replace("'", ""))
        assert tick == "✓", name
        assert named, name
        for test in named:
            path, _, function = test.partition("::")
            assert slug in function, f"{test} is not called after {name!r}"
            assert function in functions_of(ROOT / "tests" / "integration" / path), f"there is no {test}"
