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
# A directory that is there is heard from every 2 s.
LOST_S = 6.0
_NUMERIC = frozenset(range(2, len(HEADINGS)))


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


def _rendered(cluster: Cluster) -> Group:
    rows = list(map(_row, cluster.workers))
    return Group(Text(summary(cluster), style="bold"), output.table("", HEADINGS, rows, _NUMERIC))


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
