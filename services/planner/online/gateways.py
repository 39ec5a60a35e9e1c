"""What gateways count of their requests' times, read from the metrics that they show."""

from __future__ import annotations

import asyncio
import http.client
import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from prometheus_client.parser import text_string_to_metric_families

from services.planner.online.attainment import Buckets, Reading

_log = structlog.stdlib.get_logger(__name__)

TTFT, ITL = "kvferry_ttft_seconds", "kvferry_itl_seconds"
_MAX_NBYTES = 1 << 22
_TIMEOUT_S = 2.0


class Gateways:
    """``urls``: of their metrics.  ``ca``: the authority that https is held against."""

    def __init__(self, urls: Sequence[str], *, ca: Path | None = None) -> None:
        self._urls = tuple(urls)
        self._ca = ca
        self._silent: set[str] = set()

    async def read(self) -> dict[str, Reading]:
        """By address; those that do not answer in time are left out, which the log says once."""
        found = await asyncio.gather(*(asyncio.to_thread(self._read, url) for url in self._urls))
        return {url: reading for url, reading in zip(self._urls, found, strict=True) if reading is not None}

    def _read(self, url: str) -> Reading | None:
        try:
            reading = parse(_get(url, self._ca))
        except (OSError, ValueError, http.client.HTTPException) as error:
            if url not in self._silent:
                self._silent.add(url)
                _log.warning("gateway_not_read", url=url, error=str(error))
            return None
        self._silent.discard(url)
        return reading


def parse(text: str) -> Reading:
    """Raises ValueError."""
    lines = [line for line in text.splitlines() if line.startswith((f"{TTFT}_bucket", f"{ITL}_bucket"))]
    buckets: dict[str, list[tuple[float, float]]] = {TTFT: [], ITL: []}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            buckets[sample.name.removesuffix("_bucket")].append((float(sample.labels["le"]), sample.value))

    def ascending(name: str) -> Buckets:
        return tuple(sorted(buckets[name]))

    return Reading(ascending(TTFT), ascending(ITL))


def _get(url: str, ca: Path | None) -> str:
    """Blocks.  Raises OSError, ValueError and HTTPException."""
    where = urlsplit(url)
    connection: http.client.HTTPConnection
    if where.scheme == "https":
        context = ssl.create_default_context(cafile=ca)
        connection = http.client.HTTPSConnection(where.hostname or "", where.port, timeout=_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", where.path or "/metrics")
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"it answered {response.status}")
        return response.read(_MAX_NBYTES).decode()
    finally:
        connection.close()
