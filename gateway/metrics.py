"""What Prometheus learns of the gateway's view of the cluster."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

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
