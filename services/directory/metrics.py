"""What Prometheus learns of the directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.directory.events import Role
from services.directory.index import BlockIndex
from services.directory.store import Store


def index_metrics(prefix: str, index: BlockIndex) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """May be called in any thread."""
    yield GaugeMetricFamily(f"{prefix}_index_entries", "Pairs of KV block and worker held.", value=index.num_entries)
    yield GaugeMetricFamily(f"{prefix}_index_bytes", "Memory set aside for the block index.", value=index.nbytes)
    yield CounterMetricFamily(
        f"{prefix}_index_left_out", "Blocks not taken in since the index was full.", value=index.num_left_out
    )


class DirectoryCollector(Collector):
    """Reads the store when scraped, in the scraping thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        state = self._store.state
        yield GaugeMetricFamily(
            "kvferry_directory_available",
            "1 while calls are answered, 0 while the store is away.",
            value=state is not None,
        )
        yield GaugeMetricFamily("kvferry_directory_watchers", "Open watch streams.", value=len(self._store.watchers))
        if state is None:
            return
        by_role = Counter(worker.role for worker in list(state.workers.values()))
        workers = GaugeMetricFamily("kvferry_directory_workers", "Workers that hold a lease.", labels=["role"])
        for role in Role:
            workers.add_metric([role.value], by_role[role])
        yield workers
        yield from index_metrics("kvferry_directory", state.index)
        yield CounterMetricFamily(
            "kvferry_directory_events", "Changes since the state was last read anew.", value=state.num_events
        )
