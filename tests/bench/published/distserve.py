"""DistServe (Zhong et al., OSDI 2024, arXiv 2401.09670v3) and its artefact (github.com/LLMServe/DistServe, commit 82831f1).

Testbed: A100-80G SXM, NVLink in a node (section 6.1).  Objectives: table 1; that of OPT-66B on ShareGPT is 2.5 s and 0.15 s
in v3, 0.4 s and 0.1 s in v1 and in the artefact's evaluation/ae-scripts/e2e/_plot.py: both are run.  Means of lengths:
figure 7; of their spread only the plots tell, so it is assumed (``spread``), with sums below 2048 as the artefact prunes.
Parallelism, batch limits: the artefact's evaluation/2-benchmark-serving/2-start-api-server.py.  KV tokens and step times:
its simdistserve/estimators/profile_data, milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.planner.fleet import AT_ONCE, Fleet, Link, Pool, Run, simulate
from services.planner.hardware import Catalogue, Device, make_worker
from services.planner.models import ModelShape, shape_of
from services.planner.step_cost import StepCost, batch, chunk
from tests.bench.published.points import Point, Published
from tests.bench.published.rates import Lengths, from_means, highest_rate, tightest_scale

SHARE = 0.9
_MOST_TOKENS = 2048
_MOST_PER_GPU = 8.0
# GB/s each way between GPUs of a node of A100s: the KV stays in the node (section 6.3).
_NVLINK_BYTES_PER_S = 300e9 * 0.8


def opt(name: str, hidden: int, layers: int, heads: int) -> ModelShape:
    """OPT's feed-forward has two matrices of 4 hidden; `shape_of` counts three, so an inner size of two thirds."""
    return shape_of(
        name,
        {
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 8 * hidden // 3, "vocab_size": 50272, "tie_word_embeddings": True,
        },
    )  # fmt: skip


OPT_13B, OPT_66B = opt("opt-13b", 5120, 40, 40), opt("opt-66b", 9216, 64, 72)


@dataclass(frozen=True, slots=True)
class Times:
    """Of a step, milliseconds: of prompts (once, a token, a token squared) and of decoding (once, a token of context, a
    sequence; the artefact's fit for batches below 95)."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]

    def cost(self) -> StepCost:
        """Prompts and decoding never meet in a step: their constants stand apart as compute and memory."""
        once, token, square = self.prefill
        begin, context, sequence = self.decode
        return StepCost(
            compute=(once / 1e3, token / 1e3, 2 * square / 1e3, 0.0, 0.0, 0.0),
            memory=(begin / 1e3, 0.0, 0.0, 0.0, sequence / 1e3, context / 1e3),
        )


@dataclass(frozen=True, slots=True)
class System:
    """Workers of one role.  ``kv_tokens`` of each."""

    model: ModelShape
    tp: int
    num_workers: int
    kv_tokens: int
    times: Times

    def pool(
        self, catalogue: Catalogue | None, step_tokens: int, max_running: int, prompts_alone: bool = False
    ) -> Pool:
        """Of the times that were measured, or of the catalogue's."""
        if catalogue is None:
            cost = self.times.cost()
        else:
            made = make_worker(self.model, _with_much_memory(catalogue), self.tp, "bf16")
            assert made is not None
            cost = made.cost
        return Pool(self.num_workers, cost, step_tokens, self.kv_tokens, max_running, prompts_alone)


def _with_much_memory(catalogue: Catalogue) -> Device:
    """How much fits is the artefact's to say."""
    return replace(catalogue.devices["a100-80g"], memory_gbytes=1e4)


@dataclass(frozen=True, slots=True)
class Setup:
    prefill: System
    decode: System
    rival: System
    num_gpus: int
    num_rival_gpus: int

    def split(self, catalogue: Catalogue | None) -> Fleet:
        # 8192 tokens of prompts and 1024 sequences a step: the artefact's limits.
        link = Link(float(self.prefill.model.kv_token_nbytes("bf16")), _NVLINK_BYTES_PER_S * self.prefill.tp,
                    _NVLINK_BYTES_PER_S * self.decode.tp, 0.2e-3)  # fmt: skip
        return Fleet(self.decode.pool(catalogue, 8192, 1024), self.prefill.pool(catalogue, 8192, 128), link, AT_ONCE)

    def colocated(self, catalogue: Catalogue | None) -> Fleet:
        """vLLM of 2023: prompts whole and before decoding, 16384 tokens and 1024 sequences a step."""
        return Fleet(self.rival.pool(catalogue, 16384, 1024, prompts_alone=True), gateway=AT_ONCE)

    def colocated_as_quick(self) -> Fleet:
        """The same on DistServe's own engine."""
        times = next(each.times for each in (self.prefill, self.decode) if each.tp == self.rival.tp)
        return Fleet(replace(self.rival, times=times).pool(None, 16384, 1024, prompts_alone=True), gateway=AT_ONCE)


SETUP_13B = Setup(
    System(OPT_13B, 2, 1, 163008, Times((14.743, 0.068577, 2.4496e-6), (13.295, 3.4109e-4, 0.062964))),
    System(OPT_13B, 1, 1, 66144, Times((18.103, 0.101912, 7.1223e-6), (19.935, 6.2694e-4, 0.038507))),
    System(OPT_13B, 1, 1, 66144, Times((22.05, 0.1405, 8.077e-6), (23.48, 5.929e-4, 0.06073))),
    num_gpus=3, num_rival_gpus=1,
)  # fmt: skip
# Decoding with two stages of two GPUs: two batches on their way, each as slow as on two GPUs, are two workers, each with
# half of the pool.
SETUP_66B = Setup(
    System(OPT_66B, 4, 1, 78496, Times((29.44, 0.1514, 8.317e-6), (30.76, 4.519e-4, 0.06328))),
    System(OPT_66B, 2, 2, 78512 // 2, Times((43.06, 0.2742, 2.248e-5), (48.29, 9.424e-4, 0.1276))),
    System(OPT_66B, 4, 1, 78496, Times((42.97, 0.2129, 4.601e-5), (39.58, 6.946e-4, 0.1358))),
    num_gpus=8, num_rival_gpus=4,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    setup: Setup
    mean_input: float
    mean_output: float
    ttft_s: float
    tpot_s: float

    def lengths(self, spread: float, count: int) -> Lengths:
        return from_means(self.mean_input, self.mean_output, _MOST_TOKENS, spread, count)

    def keeps(self, run: Run) -> bool:
        return bool(((run.ttft_s <= self.ttft_s) & (run.tpot_s <= self.tpot_s)).mean() >= SHARE)


CHAT_13B = Work(SETUP_13B, 755.5, 200.3, 0.25, 0.1)
CHAT_66B = Work(SETUP_66B, 755.5, 200.3, 2.5, 0.15)
CHAT_66B_V1 = replace(CHAT_66B, ttft_s=0.4, tpot_s=0.1)
CODE = Work(SETUP_66B, 171.3, 98.2, 0.125, 0.2)
SUMMARY = Work(SETUP_66B, 1738.3, 90.7, 15.0, 0.15)


def points(catalogue: Catalogue, spread: float, count: int, seeds: Sequence[int]) -> list[Point]:
    chat = Published(
        "chat, ShareGPT: rate per GPU, to vLLM's",
        "section 6.2, text: 2.0 to 4.6 over OPT-13B, 66B, 175B",
        2.0,
        4.6,
        "x",
    )
    code = Published(
        "code, HumanEval, OPT-66B: rate per GPU, to vLLM's", "section 6.2, text (figure 9a)", 5.7, 5.7, "x"
    )
    summary = Published(
        "summaries, LongBench, OPT-66B: rate per GPU, to vLLM's", "section 6.2, text (figure 9b)", 4.3, 4.3, "x"
    )
    rates = [
        (replace(chat, name=f"{chat.name}, OPT-13B"), CHAT_13B),
        (replace(chat, name=f"{chat.name}, OPT-66B"), CHAT_66B),
        (replace(chat, name=f"{chat.name}, OPT-66B, 0.4 s and 0.1 s as in v1"), CHAT_66B_V1),
        (code, CODE),
        (summary, SUMMARY),
    ]
    # The rates per GPU: those of the artefact's _plot.py.
    scales = [
        ("chat, ShareGPT, OPT-13B, 1.5/s and GPU: tighter objectives than vLLM's",
         "section 6.2, text: 1.8 to 3.2 over three models", 1.8, 3.2, CHAT_13B, 1.5),
        ("code, HumanEval, OPT-66B, 0.875/s and GPU: tighter objectives than vLLM's",
         "section 6.2, text (figure 9a)", 1.4, 1.4, CODE, 0.875),
        ("summaries, LongBench, OPT-66B, 0.375/s and GPU: tighter objectives than vLLM's",
         "section 6.2, text (figure 9b)", 12.6, 12.6, SUMMARY, 0.375),
    ]  # fmt: skip
    found = []
    for published, work in rates:
        pairs = [_rates(work, costs, spread, count, seeds) for costs in (None, catalogue)]
        ratios = [split / rival if rival else np.inf for split, rival in pairs]
        (split, rival), (roof_split, roof_rival) = pairs
        setup, keeps = work.setup, work.keeps
        most = _MOST_PER_GPU * setup.num_rival_gpus
        quick = highest_rate(setup.colocated_as_quick(), work.lengths(spread, count), keeps, most, seeds)
        same = f"; colocated on DistServe's engine {quick / setup.num_rival_gpus:.2f}/s"
        note = f"per GPU: {split:.2f} to {rival:.2f}/s profiled, {roof_split:.2f} to {roof_rival:.2f}/s roofline{same}"
        found.append(Point(published, ratios[0], ratios[1], note))
    for name, source, low, high, work, rate in scales:
        tight = [_scales(work, costs, rate, spread, count, seeds) for costs in (None, catalogue)]
        note = "scales: " + ", ".join(
            f"{a:.2f} to {b:.2f} {k}" for (a, b), k in zip(tight, ("profiled", "roofline"), strict=True)
        )
        found.append(Point(Published(name, source, low, high, "x"), *(b / a for a, b in tight), note))
    example = Published(
        "chat, ShareGPT, OPT-13B, 0.2 s and 0.1 s, 1 : 1 workers of 2 : 1 GPUs: rate per GPU",
        "artefact, simdistserve/README.md: its simulator's expected result", 1.56, 1.56, "/s",
    )  # fmt: skip
    tighter = replace(CHAT_13B, ttft_s=0.2)
    both = [_rates(tighter, costs, spread, count, seeds)[0] for costs in (None, catalogue)]
    times = [
        ("DistServe, OPT-13B, 1 GPU: a prompt of 1024", SETUP_13B.decode, chunk(1024.0)),
        ("vLLM, OPT-13B, 1 GPU: a prompt of 1024", SETUP_13B.rival, chunk(1024.0)),
        ("vLLM, OPT-13B, 1 GPU: 32 decode, 800 tokens each", SETUP_13B.rival, batch(32.0, 800.0)),
        ("DistServe, OPT-66B, 4 GPUs: a prompt of 1024", SETUP_66B.prefill, chunk(1024.0)),
        ("vLLM, OPT-66B, 4 GPUs: a prompt of 1024", SETUP_66B.rival, chunk(1024.0)),
        ("vLLM, OPT-66B, 4 GPUs: 32 decode, 800 tokens each", SETUP_66B.rival, batch(32.0, 800.0)),
    ]  # fmt: skip
    for name, system, terms in times:
        measured, modelled = (1e3 * system.pool(c, 1, 1).cost.step_s(terms) for c in (None, catalogue))
        source = "artefact, simdistserve/estimators/profile_data: its fit to measured steps"
        found.append(Point(Published(name, source, measured, measured, "ms"), None, modelled))
    return [*found, Point(example, *both, "to within 0.25/s there; each objective for 90 %, not both together")]


def _rates(work: Work, costs: Catalogue | None, spread: float, count: int, seeds: Sequence[int]) -> tuple[float, float]:
    """Per GPU, split and of the rival."""
    setup, lengths = work.setup, work.lengths(spread, count)
    pairs = ((setup.split(costs), setup.num_gpus), (setup.colocated(costs), setup.num_rival_gpus))
    split, rival = (
        highest_rate(fleet, lengths, work.keeps, _MOST_PER_GPU * gpus, seeds) / gpus for fleet, gpus in pairs
    )
    return split, rival


def _scales(
    work: Work, costs: Catalogue | None, rate_per_gpu: float, spread: float, count: int, seeds: Sequence[int]
) -> tuple[float, float]:
    """The median of the seeds."""
    setup, lengths = work.setup, work.lengths(spread, count)

    def scale(fleet: Fleet, num_gpus: int) -> float:
        runs = (simulate(fleet, lengths.traffic(rate_per_gpu * num_gpus, seed)) for seed in seeds)
        return float(np.median([tightest_scale(run, work.ttft_s, work.tpot_s, SHARE) for run in runs]))

    return scale(setup.split(costs), setup.num_gpus), scale(setup.colocated(costs), setup.num_rival_gpus)
