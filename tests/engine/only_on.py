"""What is asked of torch, call by call: nothing may name tensors of two places, but for a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class OnlyOn(TorchDispatchMode):
    """Of what happens on a place while it is open.  Fails where anything but a copy there takes a tensor of another place:
    a GPU refuses that, or waits."""

    def __init__(self, place: torch.device) -> None:
        super().__init__()
        self._place = place
        self.num_copies = 0

    def check_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """From another place to this one."""
        assert func.overloadpacket is aten._to_copy, f"{func} mixes places"

    def check_call(self, func: Any, args: tuple[Any, ...]) -> None:
        """With a tensor of this place, before it is made."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, calls that are made of others arrive whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        given = _places((args, kwargs))
        if self._place in given:
            self.check_call(func, args)
        result = func(*args, **kwargs)
        made = _places(result)
        if self._place in made and given - {self._place}:
            self.check_copy(func, args, kwargs)
            self.num_copies += 1
        else:
            assert self._place not in given or made <= {self._place}, f"{func} makes something of {made}"
        return result


def _places(tree: Any) -> set[torch.device]:
    return {leaf.device for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
