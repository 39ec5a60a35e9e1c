"""What Prometheus learns of the gateway."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from gateway.seat import Seat
from gateway.view import ClusterView
from services.directory.metrics import index_metrics


class ViewCollector(Collector):
    """Reads the view when scraped."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        yield GaugeMetricFamily(
            "kvferry_gateway_view_age_seconds",
            "Time since a directory was last heard from; infinite before the first time.",
            value=self._view.age_s,
        )
        yield from index_metrics("kvferry_gateway", self._view.index)


def registry_of(view: ClusterView, seat: Seat | None) -> CollectorRegistry:
    """What is scraped.  With a ``seat`` the sums of all processes of the gateway, also of those that have ended, and the
    view of this one; what is known of a process as such, its memory say, is left out then, as it would be anybody's."""
    registry = REGISTRY
    if seat is not None:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(seat.metrics))  # type: ignore[no-untyped-call]
    registry.register(ViewCollector(view))
    return registry
