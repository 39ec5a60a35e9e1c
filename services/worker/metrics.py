"""The worker's Prometheus metrics, read from its accounts when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvferry.api.directory.v1 import directory_pb2
from services.engine.gaps import BOUNDS_S, Gaps
from services.engine.phase_book import COMPUTED, PhaseBook
from services.worker.pull_terms import Outcome
from services.worker.worker import Worker
from transport import Path


def publish_metrics(worker: Worker, registry: prometheus_client.CollectorRegistry = prometheus_client.REGISTRY) -> None:
    registry.register(_WorkerCollector(worker))


class _WorkerCollector(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        worker = self._worker
        load, work, traffic = worker.load(), worker.engine.work, worker.traffic
        blocks = GaugeMetricFamily("kvferry_kv_blocks", "KV blocks by state", labels=["state"])
        for state in ("free", "active", "cached", "lent", "quarantined"):
            blocks.add_metric([state], getattr(load.blocks, state))
        yield blocks
        yield GaugeMetricFamily("kvferry_pins", "Leases of other workers on blocks here", value=load.num_pins)
        yield GaugeMetricFamily(
            "kvferry_pinned_blocks", "KV blocks under a pin, active for that alone or not", value=load.num_pinned_blocks
        )
        sequences = GaugeMetricFamily("kvferry_sequences", "Requests on this worker by stage", labels=["stage"])
        sequences.add_metric(["running"], load.num_running)
        sequences.add_metric(["waiting"], load.num_waiting)
        yield sequences
        tokens = CounterMetricFamily("kvferry_tokens", "Tokens by how they came about", labels=["phase"])
        tokens.add_metric(["prefill"], work.prefill_tokens)
        tokens.add_metric(["decode"], work.decode_tokens)
        tokens.add_metric(["prefix_cache"], work.cached_tokens)
        yield tokens
        yield CounterMetricFamily("kvferry_drafted_tokens", "Tokens guessed and verified", value=work.drafted_tokens)
        yield CounterMetricFamily(
            "kvferry_accepted_tokens", "Guessed tokens that turned out right", value=work.accepted_tokens
        )
        yield CounterMetricFamily("kvferry_steps", "Engine steps", value=work.steps)
        yield CounterMetricFamily("kvferry_step_seconds", "Seconds the model ran", value=work.busy_s)
        with worker.phases() as book:
            phases = list(_phases(book))
        yield from phases
        yield _gap_histogram(worker.engine.gaps)
        transfer_blocks = CounterMetricFamily(
            "kvferry_transfer_blocks", "KV blocks moved by one-sided operations", labels=["direction"]
        )
        transfer_blocks.add_metric(["written"], traffic.blocks_written)
        transfer_blocks.add_metric(["received"], traffic.blocks_received)
        transfer_blocks.add_metric(["pulled"], traffic.blocks_pulled)
        yield transfer_blocks
        transfer_bytes = CounterMetricFamily(
            "kvferry_transfer_bytes", "KV bytes moved by one-sided operations", labels=["direction"]
        )
        transfer_bytes.add_metric(["written"], traffic.bytes_written)
        transfer_bytes.add_metric(["received"], traffic.bytes_received)
        transfer_bytes.add_metric(["pulled"], traffic.bytes_pulled)
        yield transfer_bytes
        yield from self._host_tier(load)
        by_path = CounterMetricFamily(
            "kvferry_transport_bytes", "Bytes that this process moved by one-sided operations", labels=["path"]
        )
        moved = worker.transport.counters().bytes_by_path
        for path in Path:
            by_path.add_metric([path], moved.get(path, 0))
        yield by_path
        pulls = CounterMetricFamily(
            "kvferry_pulls", "Requests that were to read cached blocks from another worker first", labels=["outcome"]
        )
        for outcome in Outcome:
            pulls.add_metric([outcome.value], traffic.pulls[outcome])
        yield pulls
        yield CounterMetricFamily(
            "kvferry_pull_seconds", "Seconds that requests waited for pulls", value=traffic.pull_s
        )
        checks = CounterMetricFamily(
            "kvferry_transfer_checks", "Transfers into this worker's pool that were verified", labels=["result"]
        )
        checks.add_metric(["ok"], traffic.checks_ok)
        checks.add_metric(["mismatch"], traffic.checks_mismatch)
        yield checks
        yield CounterMetricFamily(
            "kvferry_transfer_check_bytes", "KV bytes digested to verify transfers", value=traffic.bytes_digested
        )
        yield CounterMetricFamily(
            "kvferry_transfer_check_seconds", "Seconds spent digesting KV to verify transfers", value=traffic.digest_s
        )

    def _host_tier(self, load: directory_pb2.WorkerLoad) -> Iterable[Metric]:
        totals, block_nbytes = self._worker.engine.host_totals, self._worker.layout.block_nbytes
        yield GaugeMetricFamily("kvferry_host_blocks", "KV blocks in the host tier", value=load.num_host_blocks)
        yield GaugeMetricFamily(
            "kvferry_host_slots", "KV blocks that the host tier has room for", value=load.num_host_slots
        )
        copied = {"down": totals.saved, "up": totals.loaded}
        blocks = CounterMetricFamily(
            "kvferry_host_copied_blocks",
            "KV blocks saved to the host tier, and hits that came back",
            labels=["direction"],
        )
        nbytes = CounterMetricFamily("kvferry_host_copied_bytes", "Bytes of these blocks", labels=["direction"])
        for direction, count in copied.items():
            blocks.add_metric([direction], count)
            nbytes.add_metric([direction], count * block_nbytes)
        yield blocks
        yield nbytes
        yield CounterMetricFamily(
            "kvferry_host_lost_blocks", "KV blocks evicted from the pool with no copy held", value=totals.lost
        )
        yield CounterMetricFamily(
            "kvferry_host_failed_copies", "Copies to or from the host tier that failed", value=totals.failed_copies
        )


def _phases(book: PhaseBook) -> Iterable[Metric]:
    seconds = CounterMetricFamily(
        "kvferry_phase_seconds", "Seconds by what the worker did; every instant has one phase", labels=["phase"]
    )
    for phase, total_s in book.seconds.items():
        seconds.add_metric([phase.value], total_s)
    yield seconds
    flops = CounterMetricFamily(
        "kvferry_phase_flops", "FLOPs of the matrix products of engine steps, counted from shapes", labels=["phase"]
    )
    nbytes = CounterMetricFamily(
        "kvferry_phase_bytes",
        "Bytes that engine steps move at least between memory and processor, counted from shapes",
        labels=["phase", "kind"],
    )
    intensity = GaugeMetricFamily(
        "kvferry_phase_intensity", "FLOPs for each byte moved, over the last seconds of work", labels=["phase"]
    )
    mfu = GaugeMetricFamily(
        "kvferry_phase_mfu_ratio",
        "FLOP/s over the last seconds of work, as a share of the ceiling",
        labels=["phase"],
    )
    mbu = GaugeMetricFamily(
        "kvferry_phase_mbu_ratio",
        "Bytes/s over the last seconds of work, as a share of the ceiling",
        labels=["phase"],
    )
    for phase in COMPUTED:
        demand, use = book.demands[phase], book.use(phase)
        flops.add_metric([phase.value], demand.flops)
        nbytes.add_metric([phase.value, "weights"], demand.weight_bytes)
        nbytes.add_metric([phase.value, "kv_read"], demand.kv_read_bytes)
        nbytes.add_metric([phase.value, "kv_written"], demand.kv_written_bytes)
        intensity.add_metric([phase.value], use.intensity)
        mfu.add_metric([phase.value], use.mfu)
        mbu.add_metric([phase.value], use.mbu)
    yield from (flops, nbytes, intensity, mfu, mbu)
    yield GaugeMetricFamily(
        "kvferry_ceiling_flops_per_second",
        "FLOP/s that the machine does at most; 0 where it is not known",
        value=book.ceilings.flops_per_s,
    )
    yield GaugeMetricFamily(
        "kvferry_ceiling_bytes_per_second",
        "Bytes/s that the machine reads at most; 0 where it is not known",
        value=book.ceilings.bytes_per_s,
    )


def _gap_histogram(gaps: Gaps) -> HistogramMetricFamily:
    cumulative = list(accumulate(gaps.counts))
    bounds = (*map(str, BOUNDS_S), "+Inf")
    return HistogramMetricFamily(
        "kvferry_engine_step_gap_seconds",
        "Time from a step's end to the next one's start, while there was work",
        buckets=list(zip(bounds, map(float, cumulative), strict=True)),
        sum_value=gaps.total_s,
    )
