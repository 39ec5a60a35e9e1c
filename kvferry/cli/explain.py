"""kvferry explain: why a request went to the workers that it went to."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from kvferry.cli import options, output
from kvferry.client import DEFAULT_ADDRESS, Client
from kvferry.types import RouteDecision, RouteOption

# Narrow enough for 80 columns.
HEADINGS = ("", "prefill", "decode", "cache", "queue", "pull", "fill", "ship", "lost", "decode", "total")
_NUMERIC = frozenset(range(3, len(HEADINGS)))


def explain(
    request_id: Annotated[str, typer.Argument(help="As the answer, the HTTP header or the log names it.")],
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    timeout: options.Timeout = None,
    as_json: options.Json = False,
) -> None:
    """Show why a request went to its workers.

    One table for each attempt, the cheapest option first, the chosen one marked *: milliseconds predicted from what workers
    measured. Queue is until the prompt's turn, pull for cached blocks that are read from another worker, fill (prefill)
    for what is then not cached, ship for the handover and the bytes that the decode worker lacks, lost what others lose:
    the decode worker's while it computes the prompt itself (no prefill worker: -), times --stall-weight, and who would have
    found the cached blocks that make room for pulled ones; decode for the answer's first tokens. Cache counts prompt
    tokens on the prefill/decode worker. Each process of the gateway remembers its last 1000 requests.

    \b
    Example:
      kvferry explain 5f0c6c1e
    """
    with output.failures(address), Client(address, api_key=api_key, tls=options.client_tls(tls_ca)) as client:
        decisions = client.explain_route(request_id, timeout=timeout)
        if as_json:
            output.print_json({"request_id": request_id, "decisions": list(map(dataclasses.asdict, decisions))})
            return
        for attempt, decision in enumerate(decisions, start=1):
            _show(attempt, decision)


def _show(attempt: int, decision: RouteDecision) -> None:
    when = f"attempt {attempt}, {decision.age_s:.1f} s ago, view {decision.view_age_s:.1f} s old then"
    if decision.options:
        title = f"{when}, {decision.num_prompt_tokens} prompt tokens, times in ms\n{decision.reason}"
        output.show_table(title, HEADINGS, list(map(_row, decision.options)), _NUMERIC)
    else:
        print(f"{when}\n{decision.reason}")
    for worker_id, why in decision.passed_over.items():
        print(f"not {worker_id}: {why}")


def _row(option: RouteOption) -> tuple[str, ...]:
    seconds = (
        option.queue_s,
        option.pull_s,
        option.prefill_s,
        option.ship_s,
        option.stall_s + option.evict_s,
        option.decode_s,
        option.total_s,
    )
    return (
        "*" if option.chosen else "full" if option.full else "",
        option.prefill_worker or "-",
        option.decode_worker,
        f"{option.num_prefill_cached_tokens}/{option.num_decode_cached_tokens}",
        *(_ms(s) for s in seconds),
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 1 else 1}f}"
