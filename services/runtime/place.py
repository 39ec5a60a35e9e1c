"""Where a process runs, and how far that is from another's place.  Pure."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

PLACE_LABELS = ("host", "rack", "zone")


class Distance(IntEnum):
    """Numbered as kvferry.api.directory.v1.Distance."""

    HOST = 1
    RACK = 2
    ZONE = 3
    FARTHER = 4


class Place(NamedTuple):
    """Names as the labels host, rack and zone say them; empty where they do not."""

    host: str = ""
    rack: str = ""
    zone: str = ""

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> Place:
        return cls(*(labels.get(name, "") for name in PLACE_LABELS))


NOWHERE = Place()


@functools.lru_cache(maxsize=65_536)  # routing asks of every pair, for every request
def distance_between(one: Place, other: Place) -> Distance:
    """By the narrowest name that both have alike, unless a wider one tells them apart: racks are often numbered in each
    zone anew."""
    found = Distance.FARTHER
    for distance, here, there in (
        (Distance.ZONE, one.zone, other.zone),
        (Distance.RACK, one.rack, other.rack),
        (Distance.HOST, one.host, other.host),
    ):
        if here and here == there:
            found = distance
        elif here and there:
            return found
    return found
