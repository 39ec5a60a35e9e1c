"""Prompts whose answers quote them, and prompts whose answers do not."""

from __future__ import annotations

import inspect
from types import ModuleType

from services.engine import batch, blocks, chat, hashing, layout, lookup, rope, sampler

# Made from this repository, so that no licence but its own is asked of anybody.
_MODULES: tuple[ModuleType, ...] = (batch, blocks, chat, hashing, layout, lookup, rope, sampler)
CODE = [inspect.getsource(module)[:1800] for module in _MODULES]
PASSAGES = [(module.__doc__ or "") + inspect.getsource(module)[200:900] for module in _MODULES]

OPENINGS = [
    "Once upon a time, in a village by the sea, there lived a",
    "The history of the steam engine begins with",
    "Dear Margaret, I am writing to you because",
    "The three things that I like least about winter are",
    "In the laboratory, Dr. Okafor opened the notebook and",
    "Why do cats purr? Scientists believe that",
    "The recipe is simple: take two onions and",
    "Markets fell sharply on Tuesday after the central bank",
]
