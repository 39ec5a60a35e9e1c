"""Everything that reads what others send."""

from __future__ import annotations

from tests.fuzz import doors, files, messages, rpc

_MODULES = (doors, rpc, messages, files)
TARGETS = [target for module in _MODULES for target in module.TARGETS]
MODULES = {target.name: module.__name__ for module in _MODULES for target in module.TARGETS}
