"""python3 requirements.py EXTRA...: what kvferry and these extras depend on, a line each, by pyproject.toml beside it.
Images install it in a layer of its own, which nothing else in pyproject.toml changes."""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    PROJECT = tomllib.load(file)["project"]
EXTRAS = PROJECT["optional-dependencies"]
_OWN = re.compile(r"kvferry\[([\w,]+)\]")


def requirements(names: list[str]) -> set[str]:
    found = set()
    for line in (line for name in names for line in EXTRAS[name]):
        own = _OWN.fullmatch(line)
        found |= requirements(own[1].split(",")) if own else {line}
    return found


print("\n".join(sorted(requirements(sys.argv[1:]) | set(PROJECT["dependencies"]))))
