"""make bench-pull: the time to the first token of a prompt whose prefix another worker holds, pulled against computed.

Two decode workers with the real model, asked directly, as a gateway would.  In each round one of them has a fresh random
prefix cached; the other gets it with a few more tokens and reads the prefix from there, and computes another prompt of the
same length on its own.  The order alternates, ratios are taken within rounds, and both must have done what they were to.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Member, Role
from kvferry.cli.ports import LOOPBACK, join, pick_free
from tests.bench.overlap.pairs import interval
from tests.decode_calls import BlockingDecodeCall

ROOT = Path(__file__).resolve().parents[3]
NUM_MORE = 32  # tokens of the prompt behind the prefix
GOAL = 0.15


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds to the first token, as the caller saw it, and what the puller said of the pull."""

    pulled_s: float
    computed_s: float
    pull: common_pb2.PullStats


def worker(name: str) -> Member:
    address, nobody = (join(LOOPBACK, port) for port in pick_free(2))
    flags = ("--listen", address, "--directory", nobody, "--worker-id", name, "--threads", "1", "--kv-memory", "1GiB")
    return Member(name, Role.DECODE, (sys.executable, "-m", "services.decode", *flags), address, cwd=ROOT)


def fresh(num_tokens: int) -> list[int]:
    return [random.randrange(1000, 40000) for _ in range(num_tokens)]


def ask(
    channel: grpc.Channel, prompt: list[int], pull: worker_pb2.PullSource | None = None
) -> tuple[float, common_pb2.PrefillStats]:
    sampling = common_pb2.SamplingParams(max_tokens=2, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True)
    request = worker_pb2.DecodeOpen(request_id="bench", prompt_token_ids=prompt, sampling=sampling, pull=pull)
    began = time.perf_counter()
    call = BlockingDecodeCall(channel, request, 600)
    assert next(call).HasField("token")
    ttft_s = time.perf_counter() - began
    *_, last = call
    return ttft_s, last.finished.prefill


def measure(holder: grpc.Channel, puller: grpc.Channel, num_tokens: int, pulls_first: bool) -> Round:
    info = worker_pb2_grpc.WorkerServiceStub(holder).GetStats(worker_pb2.GetStatsRequest(), timeout=10).state.info
    block_size = info.layout.block_size_tokens
    source = worker_pb2.PullSource(
        worker_id=info.worker_id, incarnation=info.incarnation, control_address=info.control_address,
        num_blocks=num_tokens // block_size,
    )  # fmt: skip
    prefix = fresh(num_tokens)
    ask(holder, prefix)
    taken = {}
    for pulls in (True, False) if pulls_first else (False, True):
        taken[pulls] = ask(
            puller, (prefix if pulls else fresh(num_tokens)) + fresh(NUM_MORE), source if pulls else None
        )
    (pulled_s, pulled), (computed_s, computed) = taken[True], taken[False]
    if pulled.pull.num_blocks != source.num_blocks or computed.num_cached_tokens:
        raise RuntimeError(f"not pulled or not computed as it should be: {pulled}; {computed}")
    return Round(pulled_s, computed_s, pulled.pull)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pull", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds to measure (default: 7)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in the prefix (default: 2048)")
    arguments = parser.parse_args()
    console = Console()
    members = [worker("holder"), worker("puller")]
    console.print("starting two workers with the real model, one thread each")
    rounds = []
    with (
        LocalCluster(members, ROOT / "build/logs/bench-pull", restart=False) as local,
        grpc.insecure_channel(local.address("holder")) as holder,
        grpc.insecure_channel(local.address("puller")) as puller,
    ):
        for number in track(range(-1, arguments.rounds), f"prefixes of {arguments.tokens} tokens", console=console):
            taken = measure(holder, puller, arguments.tokens, pulls_first=number % 2 == 0)
            if number >= 0:  # the first opens connections and pools
                rounds.append(taken)
    report(console, rounds, arguments.tokens)


def report(console: Console, rounds: list[Round], num_tokens: int) -> None:
    figures = {
        "TTFT pulled / computed": ([r.pulled_s / r.computed_s for r in rounds], ".4f"),
        "TTFT pulled, ms": ([1e3 * r.pulled_s for r in rounds], ".1f"),
        "TTFT computed, ms": ([1e3 * r.computed_s for r in rounds], ".0f"),
        "the pull, ms": ([r.pull.elapsed_us / 1e3 for r in rounds], ".2f"),
        "of it, while bytes moved, ms": ([r.pull.busy_us / 1e3 for r in rounds], ".2f"),
        "read at, GB/s": ([r.pull.num_bytes / r.pull.busy_us / 1e3 for r in rounds], ".2f"),
    }
    table = Table("figure", "median", "95 % interval")
    for name, (values, form) in figures.items():
        low, high = interval(values)
        table.add_row(name, f"{statistics.median(values):{form}}", f"{low:{form}} - {high:{form}}")
    console.print(table)
    ratio = statistics.median(r.pulled_s / r.computed_s for r in rounds)
    row = {
        "work": f"TTFT with pull / recomputed, prefix of {num_tokens} tokens",
        "ours": statistics.median(r.pulled_s for r in rounds),
        "peer": statistics.median(r.computed_s for r in rounds),
        "ratio": ratio,
        "goal": GOAL,
        "unit": "s",
    }
    console.print(f"{row['work']}: {ratio:.4f}, goal at most {GOAL}")
    out = ROOT / "build" / "bench" / "pull.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([row], indent=1) + "\n")
    console.print(f"wrote {out.relative_to(ROOT)}; {len(rounds)} rounds, taken in turn in one run")


if __name__ == "__main__":
    main()
