"""A cluster that answers a prompt split and on one worker, and what each takes."""

from __future__ import annotations

import random
import time
from pathlib import Path

from kvferry import Client, Timeline
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, Member, Role, clone_root, plan
from kvferry.cli.ports import LOOPBACK, join, pick_free
from tests.bench.overlap.pairs import Pair

ROOT = Path(__file__).resolve().parents[3]
NUM_STEPS = 4
NEVER_SHIP = 1_000_000


def cluster() -> tuple[LocalCluster, str, str]:
    """Not started yet, with the addresses of the gateway that splits and of the one that does not."""
    config = ClusterConfig(grpc_port=0, http_port=0, threads=1, kv_memory="1GiB")
    planned = plan(config, clone_root())
    splits = planned.members[-1]
    single, http = (join(LOOPBACK, port) for port in pick_free(2))
    # The last of a flag wins.  Routing by costs would split whatever the least that may be shipped.
    never = ("--routing", "round-robin", "--min-ship-tokens", str(NEVER_SHIP))
    flags = ("--listen", single, "--http-listen", http, *never)
    other = Member("single", Role.GATEWAY, (*splits.command, *flags), single, cwd=splits.cwd)
    members = (*planned.members, other)
    return LocalCluster(members, ROOT / "build/logs/bench-overlap", restart=False), planned.grpc_address, single


def prompt_of(num_tokens: int) -> list[int]:
    """Random, and none that a tokenizer in use has for special tokens."""
    return random.choices(range(1000, 40000), k=num_tokens)


def ask(client: Client, num_tokens: int) -> tuple[float, Timeline]:
    """Seconds to the first token, and the rest of the story."""
    prompt = prompt_of(num_tokens)
    began = time.perf_counter()
    with client.generate(prompt, max_tokens=NUM_STEPS + 1, temperature=0, ignore_eos=True, timeout=600) as stream:
        next(chunk for chunk in stream if chunk.tokens)
        ttft_s = time.perf_counter() - began
        return ttft_s, stream.result().timeline


def measure(split: Client, single: Client, num_tokens: int, split_first: bool) -> Pair:
    taken = {}
    for client in (split, single) if split_first else (single, split):
        taken[client] = ask(client, num_tokens)
    (split_s, timeline), (single_s, alone) = taken[split], taken[single]
    prefill, transfer, handover_s = timeline.prefill, timeline.transfer, timeline.handover_s
    if prefill is None or transfer is None or handover_s is None or alone.transfer is not None:
        raise RuntimeError(f"not split as it should be: {timeline.route_reason}; {alone.route_reason}")
    return Pair(
        split_s,
        single_s,
        prefill.compute_s,
        transfer.exposed_s,
        handover_s,
        transfer.num_hidden_bytes / transfer.num_bytes,
    )
