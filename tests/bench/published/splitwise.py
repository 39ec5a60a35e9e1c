"""Splitwise (Patel et al., ISCA 2024, arXiv 2311.18677v2) and its artefact (github.com/Mutinifni/splitwise-sim, commit
8f99e7d).

Objectives: nine, table VI, slowdowns to a request alone on a DGX-A100.  Machines: eight GPUs, $17.6 and $38 an hour,
InfiniBand of 200 and 400 Gb/s a GPU (table I).  Model: BLOOM-176B.  Numbers of machines: sections 6.2 and 6.3, and of each
role the best (the artefact sweeps them too).  Lengths: quantiles of AzureLLMInferenceTrace_conv.csv, from which the
artefact draws too, prompts and answers independently; Poisson arrivals.  Step times: medians of the artefact's
data/perf_model.csv at tensor_parallel 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.planner.fleet import AT_ONCE, Fleet, Link, Pool, Run, simulate
from services.planner.hardware import Catalogue, Worker, make_worker
from services.planner.models import shape_of
from services.planner.step_cost import StepCost, batch, chunk
from services.planner.traffic import Seconds
from tests.bench.published.points import Point, Published
from tests.bench.published.rates import Lengths, from_quantiles, highest_rate

# BLOOM's feed-forward has two matrices of 4 hidden; `shape_of` counts three.
BLOOM = shape_of(
    "bloom-176b",
    {
        "hidden_size": 14336, "num_hidden_layers": 70, "num_attention_heads": 112, "intermediate_size": 8 * 14336 // 3,
        "vocab_size": 250880, "tie_word_embeddings": True,
    },
)  # fmt: skip

_RANKS = (*range(0, 100, 5), 99, 100)
_CONVERSATION = (
    (2, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315, 1876, 2734, 4083, 4142,
     14050),
    (7, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424, 451, 601, 1000),
)  # fmt: skip

# Seconds.  Prompts take the longer of two lines, through the medians at 1 token (of decoding), 2048, 4096; answers add what
# they do from a batch of 1 to one of 32.  Within 20 % of all medians up to 4096 tokens.
_PROFILED = {
    "a100-80g": StepCost(
        compute=(-0.2674, 0.3945e-3, 0, 0, 0, 0), memory=(0.0482, 0.2402e-3, 0, 0, 0.536e-3, 0)
    ),
    "h100": StepCost(
        compute=(-0.1825, 0.2127e-3, 0, 0, 0, 0), memory=(0.0358, 0.1061e-3, 0, 0, 0.314e-3, 0)
    ),
}  # fmt: skip
_USD = {"a100-80g": 17.6, "h100": 38.0}
# Prompts are computed whole (section 4.2 lets one batch hold 2048 tokens, or one longer prompt).
_STEP_TOKENS = 16384
_SLOWDOWNS = {50: (2.0, 1.25, 1.25), 90: (3.0, 1.5, 1.5), 99: (6.0, 5.0, 5.0)}
_MOST_PER_S = 512.0


@dataclass(frozen=True, slots=True)
class Costs:
    """``profiled``: the paper's step times; else those of the catalogue.  Memory and links are the catalogue's."""

    catalogue: Catalogue
    profiled: bool

    def worker(self, device: str) -> Worker:
        made = make_worker(BLOOM, self.catalogue.devices[device], 8, "bf16")
        assert made is not None
        return made

    def step(self, device: str) -> StepCost:
        return _PROFILED[device] if self.profiled else self.worker(device).cost

    def pool(self, device: str, num_machines: int) -> Pool:
        return Pool(num_machines, self.step(device), _STEP_TOKENS, self.worker(device).kv_tokens, 256)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines; ``prefill`` None: all do both, with prompts and answers in the same steps."""

    decode: tuple[str, int]
    prefill: tuple[str, int] | None = None

    @property
    def usd_per_hour(self) -> float:
        return sum(_USD[device] * count for device, count in filter(None, (self.prefill, self.decode)))

    def fleet(self, costs: Costs) -> Fleet:
        decode = costs.pool(*self.decode)
        if self.prefill is None:
            return Fleet(decode, gateway=AT_ONCE)
        sender, receiver = costs.worker(self.prefill[0]), costs.worker(self.decode[0])
        link = Link(sender.kv_token_nbytes, sender.link_bytes_per_s, receiver.link_bytes_per_s, sender.round_trip_s)
        return Fleet(decode, costs.pool(*self.prefill), link, AT_ONCE)


def keeps(run: Run, reference: StepCost) -> bool:
    """All nine objectives."""
    num_input, num_output = (each.astype(np.float64) for each in (run.traffic.num_input, run.traffic.num_output))
    one, none = np.ones_like(num_input), np.zeros_like(num_input)
    ttft_s = _step_s(reference, (one, num_input, num_input**2 / 2, num_input, none, none))
    tbt_s = _step_s(reference, (one, none, none, none, one, num_input + num_output / 2))
    slow = (run.ttft_s / ttft_s, run.tpot_s / tbt_s, run.e2e_s / (ttft_s + tbt_s * (num_output - 1)))
    return all(
        float(np.percentile(each, rank)) <= bound
        for rank, bounds in _SLOWDOWNS.items()
        for each, bound in zip(slow, bounds, strict=True)
    )


def _step_s(cost: StepCost, terms: Sequence[Seconds]) -> Seconds:
    additive, compute, memory = (
        np.sum([price * count for price, count in zip(prices, terms, strict=True)], axis=0)
        for prices in (cost.additive, cost.compute, cost.memory)
    )
    return np.asarray(additive + np.maximum(compute, memory))


A, H = "a100-80g", "h100"
BASELINE_A, BASELINE_H = Cluster((A, 70)), Cluster((H, 40))
# Of every cluster all splits in steps of five, as the artefact's configs/experiment sweep them; of HA those of the power of
# 40 DGX-H100, as configs/cluster/isopower_hybrid.yaml trades them: 44 for 24.8.
AA_POWER = [Cluster((A, 70 - n), (A, n)) for n in range(5, 70, 5)]
AA_COST = [Cluster((A, 86 - n), (A, n)) for n in range(5, 86, 5)]
HA_POWER = [Cluster((A, int(44 * (40 - n) / 24.8)), (H, n)) for n in range(5, 40, 5)]


class _Rates:
    def __init__(self, costs: Costs, lengths: Lengths, seeds: Sequence[int]) -> None:
        self._costs, self._lengths, self._seeds = costs, lengths, seeds
        self._reference = costs.step(A)
        self._known: dict[Cluster, float] = {}

    def highest(self, *clusters: Cluster) -> tuple[float, Cluster]:
        """The best of them."""
        best = (0.0, clusters[0])
        for cluster in clusters:
            if cluster not in self._known:
                fleet = cluster.fleet(self._costs)
                # Whether it is worth a search.
                better = not best[0] or self._keeps(simulate(fleet, self._lengths.traffic(best[0], self._seeds[0])))
                self._known[cluster] = (
                    highest_rate(fleet, self._lengths, self._keeps, _MOST_PER_S, self._seeds) if better else 0.0
                )
            best = max(best, (self._known[cluster], cluster), key=lambda found: found[0])
        return best

    def _keeps(self, run: Run) -> bool:
        return keeps(run, self._reference)

    def ratio(self, clusters: Sequence[Cluster], rival: Cluster) -> float:
        rate = self.highest(rival)[0]
        return self.highest(*clusters)[0] / rate if rate else float("inf")

    def rates(self, clusters: Sequence[Cluster], rival: Cluster) -> str:
        rate, best = self.highest(*clusters)
        assert best.prefill is not None
        return f"{rate:.0f}/s ({best.prefill[1]} : {best.decode[1]}) to {self.highest(rival)[0]:.0f}/s"

    def stressed_per_usd(self, cluster: Cluster) -> float:
        """Requests a second for a dollar an hour, when all are there at once."""
        run = simulate(cluster.fleet(self._costs), self._lengths.traffic(1e6, 0))
        return len(run.traffic) / run.end_of_all_s / cluster.usd_per_hour

    def cost_of_the_same(self, clusters: Sequence[Cluster], rival: Cluster) -> float:
        """The smallest cluster in the proportion of the best of ``clusters`` that has ``rival``'s rate: its cost to
        ``rival``'s."""
        rate, best = self.highest(rival)[0], self.highest(*clusters)[1]
        assert best.prefill is not None
        share = best.prefill[1] / (best.prefill[1] + best.decode[1])
        for count in range(4, 201, 2):
            prefill = round(count * share)
            cluster = Cluster((A, count - prefill), (A, prefill))
            if self._keeps(simulate(cluster.fleet(self._costs), self._lengths.traffic(rate, self._seeds[0]))):
                return cluster.usd_per_hour / rival.usd_per_hour
        return float("inf")


def points(catalogue: Catalogue, count: int, seeds: Sequence[int]) -> list[Point]:
    lengths = from_quantiles(*_CONVERSATION, _RANKS, count)
    profiled, roofline = (_Rates(Costs(catalogue, each), lengths, seeds) for each in (True, False))

    def point(name: str, source: str, figure: float, unit: str, of: Callable[[_Rates], float]) -> Point:
        return Point(Published(name, source, figure, figure, unit), of(profiled), of(roofline))

    def rates(clusters: Sequence[Cluster], rival: Cluster) -> str:
        return f"{profiled.rates(clusters, rival)} profiled; {roofline.rates(clusters, rival)} roofline"

    found = [
        Point(
            Published("conversation, 70 DGX-A100: AA, to Baseline-A100", "section 6.2, text (figure 18a)", 2.15, 2.15, "x"),
            *(each.ratio(AA_POWER, BASELINE_A) for each in (profiled, roofline)), rates(AA_POWER, BASELINE_A),
        ),
        Point(
            Published("conversation, power of 40 DGX-H100: HA, to Baseline-H100",
                      "section 6.2, text (figure 18a), which names no rival; by cost it is Baseline-H100", 1.18, 1.18, "x"),
            *(each.ratio(HA_POWER, BASELINE_H) for each in (profiled, roofline)), rates(HA_POWER, BASELINE_H),
        ),
        Point(
            Published("conversation, AA of 86 DGX-A100, to Baseline-H100 of 40, same cost",
                      "section 6.3, text (figure 18b)", 1.4, 1.4, "x"),
            *(each.ratio(AA_COST, BASELINE_H) for each in (profiled, roofline)), rates(AA_COST, BASELINE_H),
        ),
        point("conversation, cost of AA with Baseline-H100's rate, to its", "section 6.3, text (figure 19b)", 0.75, "x",
              lambda each: each.cost_of_the_same(AA_COST, BASELINE_H)),
        point("stressed, Baseline-A100's rate for a dollar, to Baseline-H100's", "section 6.5, text: 0.89 to 0.75",
              0.89 / 0.75, "x", lambda each: each.stressed_per_usd(BASELINE_A) / each.stressed_per_usd(BASELINE_H)),
    ]  # fmt: skip
    # Medians of five rows each.
    steps = [
        (A, "a prompt of 1024", chunk(1024.0), 289.2), (A, "a prompt of 2048", chunk(2048.0), 540.4),
        (A, "32 decode, 576 tokens each", batch(32.0, 576.0), 65.38),
        (H, "a prompt of 1024", chunk(1024.0), 132.6), (H, "a prompt of 2048", chunk(2048.0), 253.1),
        (H, "32 decode, 576 tokens each", batch(32.0, 576.0), 45.84),
    ]  # fmt: skip
    for device, what, terms, measured in steps:
        published = Published(
            f"BLOOM-176B, 8 {device}: {what}", "artefact, data/perf_model.csv: median", measured, measured, "ms"
        )
        costs = (1e3 * Costs(catalogue, each).step(device).step_s(terms) for each in (True, False))
        found.append(Point(published, *costs))
    return found
