"""kvferry status: the cluster as its gateway sees it."""

from __future__ import annotations

import threading
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from kvferry.cli import options, output
from kvferry.client import DEFAULT_ADDRESS, Client
from kvferry.types import Cluster, Worker

# Narrow enough for 80 columns; what is left out is in --json.
HEADINGS = (
    "worker",
    "state",
    "run",
    "wait",
    "pre/s",
    "dec/s",
    "free",
    "active",
    "pinned",
    "cached",
    "lent",
    "quar.",
    "all",
)
PHASE_HEADINGS = ("worker", "prefill", "decode", "transfer", "idle", "MFU pre", "MFU dec", "MBU pre", "MBU dec")
# A directory that is there is heard from every 2 s.
LOST_S = 6.0
_NUMERIC = frozenset(range(2, len(HEADINGS)))
_PHASE_NUMERIC = frozenset(range(1, len(PHASE_HEADINGS)))


def status(
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    timeout: options.Timeout = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks with --watch.")] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Show workers, their KV blocks by state, their load and rates.

    Run and wait count requests; pre/s and dec/s are tokens per second of prefill and of decode, over the last seconds of
    work. Free, active, cached, lent and quarantined KV blocks add up to all of a worker's; pinned ones, which others read,
    are among the active. The gateway answers from its own view, whose age is shown. Roles, addresses, sizes and what the
    hosts' memory holds are in --json.

    The second table says where the last seconds went, by phase, and how much of the machine's FLOP/s (MFU) and memory
    bandwidth (MBU) prefill and decode used while they were computed; - where that is not known.

    \b
    Examples:
      kvferry status
      kvferry status --watch
      kvferry status --json | jq '.workers[].blocks'
    """
    with output.failures(address), Client(address, api_key=api_key, tls=options.client_tls(tls_ca)) as client:
        if not watch:
            _show(client.cluster(timeout=timeout), as_json)
            return
        pause = threading.Event()
        try:
            if output.is_terminal() and not as_json:
                with Live(_rendered(client.cluster(timeout=timeout)), auto_refresh=False) as live:
                    while not pause.wait(interval):
                        live.update(_rendered(client.cluster(timeout=timeout)), refresh=True)
            while True:
                _show(client.cluster(timeout=timeout), as_json)
                pause.wait(interval)
        except KeyboardInterrupt:
            return  # the way to leave --watch


def _show(cluster: Cluster, as_json: bool) -> None:
    if as_json:
        output.print_json(cluster)
    else:
        output.show_table(summary(cluster), HEADINGS, list(map(_row, cluster.workers)), _NUMERIC)
        if rows := _phase_rows(cluster):
            output.show_table(ratio(cluster), PHASE_HEADINGS, rows, _PHASE_NUMERIC)


def _rendered(cluster: Cluster) -> Group:
    rows = list(map(_row, cluster.workers))
    group = Group(Text(summary(cluster), style="bold"), output.table("", HEADINGS, rows, _NUMERIC))
    if phase_rows := _phase_rows(cluster):
        group.renderables.append(Text(ratio(cluster), style="bold"))
        group.renderables.append(output.table("", PHASE_HEADINGS, phase_rows, _PHASE_NUMERIC))
    return group


def summary(cluster: Cluster) -> str:
    workers = "1 worker" if len(cluster.workers) == 1 else f"{len(cluster.workers)} workers"
    lost = " (no directory answers)" if cluster.view_age_s >= LOST_S else ""
    return (
        f"{cluster.model.name}, {workers}, {cluster.num_requests_in_flight} requests in flight, "
        f"{cluster.num_requests_total} in total, view {cluster.view_age_s:.1f} s old{lost}, kvferry {cluster.version}"
    )


def _row(worker: Worker) -> tuple[str, ...]:
    blocks = worker.blocks
    return (
        worker.worker_id,
        "drain" if worker.draining else "ready",
        str(worker.num_running),
        str(worker.num_waiting),
        f"{worker.prefill_tokens_per_s:.0f}",
        f"{worker.decode_tokens_per_s:.0f}",
        *map(str, (blocks.free, blocks.active, worker.num_pinned_blocks)),
        *map(str, (blocks.cached, blocks.lent, blocks.quarantined, blocks.total)),
    )


def ratio(cluster: Cluster) -> str:
    """Of the workers' computing time in the last seconds."""
    phases = [worker.phases for worker in cluster.workers if worker.phases]
    prefill, decode = sum(p.prefill.share for p in phases), sum(p.decode.share for p in phases)
    # What is left of work minutes ago is no ratio of anything.
    if prefill + decode < 0.001 * max(1, len(phases)):
        return "prefill : decode - : -, nothing was computed in the last seconds"
    of_all = (prefill + decode) / len(phases)
    part = prefill / (prefill + decode)
    return (
        f"prefill : decode {100 * part:.0f} : {100 - 100 * part:.0f} of the time that was computed, {of_all:.0%} of all"
    )


def _phase_rows(cluster: Cluster) -> list[tuple[str, ...]]:
    rows = []
    for worker in cluster.workers:
        if (phases := worker.phases) is None:
            continue
        shares = (phases.prefill, phases.decode, phases.transfer, phases.idle)
        uses = (phases.prefill.mfu, phases.decode.mfu, phases.prefill.mbu, phases.decode.mbu)
        rows.append(
            (
                worker.worker_id,
                *(f"{100 * use.share:.1f}%" for use in shares),
                *(f"{100 * value:.1f}%" if value else "-" for value in uses),
            )
        )
    return rows
