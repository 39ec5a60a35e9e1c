"""The traffic of gateways that run, for a plan."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain

from kvferry.bench.record import percentile
from kvferry.bench.slo import Slo
from kvferry.bench.workload import Ask
from kvferry.client import Client
from kvferry.errors import InvalidRequestError
from kvferry.types import TlsConfig, Traffic


def hear_traffic(addresses: str, api_key: str | None, tls: TlsConfig | None) -> Traffic:
    """Of all these gateways together, as if it were one's.  Raises kvferry.Error."""
    heard: list[Traffic] = []
    for address in addresses.split(","):
        began_s = time.monotonic()
        with Client(address, api_key=api_key, tls=tls) as client:
            told = client.traffic()
        waited_s = time.monotonic() - began_s
        heard = [*(_later(each, waited_s) for each in heard), told]
    if others := {each.model.name for each in heard} - {heard[0].model.name}:
        raise InvalidRequestError(f"--live: one gateway serves {heard[0].model.name}, another {others.pop()}")
    served = sorted(chain.from_iterable(each.served for each in heard), key=lambda each: -each.age_s)
    since_s = min(each.since_s for each in heard)
    # Before, one of them may have forgotten more than another.
    served = [each for each in served if each.age_s <= since_s]
    if len(served) < 2:
        raise InvalidRequestError(f"{addresses} has answered {len(served)} requests; there is nothing to plan for yet")
    return replace(heard[0], since_s=since_s, served=tuple(served))


def _later(traffic: Traffic, by_s: float) -> Traffic:
    served = tuple(replace(each, age_s=each.age_s + by_s) for each in traffic.served)
    return replace(traffic, since_s=traffic.since_s + by_s, served=served)


def asks_of(traffic: Traffic) -> list[Ask]:
    """By the clock of the world."""
    now_s = time.time()
    return [
        Ask(now_s - s.age_s, s.num_prompt_tokens, s.num_output_tokens, num_cached_tokens=s.num_cached_tokens)
        for s in traffic.served
    ]


def attainment(traffic: Traffic, objectives: Slo, named: str) -> str:
    """How the gateways' answers did, in a sentence.  A request's ITL is the 99th percentile of its gaps."""
    served = traffic.served
    good = sum(objectives.are_met(s.ttft_s, s.itl_p99_s, s.tpot_s, s.total_s) for s in served)
    first = sorted(s.ttft_s for s in served)
    gaps = sorted(s.itl_p99_s for s in served if s.itl_p99_s is not None)
    itl = f", ITL p50 {percentile(gaps, 50) * 1e3:.0f} ms" if gaps else ""
    return (
        f"{traffic.model.name} answered {len(served)} requests in the last {served[0].age_s:.0f} s, "
        f"{good / len(served):.1%} of them within {named}; "
        f"TTFT p50 {percentile(first, 50):.3g}, p99 {percentile(first, 99):.3g} s{itl}"
    )
