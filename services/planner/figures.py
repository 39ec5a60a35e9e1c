"""From runs of a fleet to the figures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvferry.bench.slo import Slo
from services.planner.designs import instances, num_devices
from services.planner.fleet import Run
from services.planner.hardware import Worker
from services.planner.report import Option, Percentiles, Roofline, Window, interval
from services.planner.search import Found
from services.planner.sizing import is_good
from services.planner.step_cost import Terms, batch, chunk
from services.planner.traffic import Seconds, Traffic

NUM_WINDOWS = 48
# In the accounts of traffic over time: what decodes together on the reference worker.
REFERENCE_BATCH = 32
REFERENCE_CHUNK = 2048


def option(
    found: Found, runs: Sequence[Run], slo: Slo, share: float, usd_by_seed: Sequence[float], num_cells: int
) -> Option:
    """``found`` is one cell's, and so are ``runs``, a seed each."""
    design, size = found.design, found.size
    devices = num_devices(design, size)
    good = [np.logical_and(*is_good(run, slo)) for run in runs]
    goodput = [float(g.sum()) / run.traffic.duration_s for g, run in zip(good, runs, strict=True)]
    first = runs[0]
    return Option(
        kind=design.kind.value, share=share,
        prefill=None if design.prefill is None else str(design.prefill), decode=str(design.decode),
        num_prefill=size.num_prefill * num_cells, num_decode=size.num_decode * num_cells,
        step_tokens=design.step_tokens, mixed_tokens=design.mixed_tokens, patience=design.patience,
        num_devices=devices * num_cells,
        instances={name: count * num_cells for name, count in instances(design, size).items()},
        usd_per_hour=found.usd_per_hour * num_cells,
        usd_per_mtok=interval([
            usd / 3600 * run.traffic.duration_s / run.traffic.num_tokens * 1e6
            for usd, run in zip(usd_by_seed, runs, strict=True)
        ]),
        attained=interval([float(g.mean()) for g in good]),
        first_token=_percentiles(runs, lambda run: run.ttft_s),
        second_token=_percentiles(runs, lambda run: (run.second_s - run.traffic.arrive_s)[run.traffic.num_output > 1]),
        itl=Percentiles(*(interval([run.itl_s(rank) for run in runs]) for rank in (50, 90, 99))),
        tpot=_percentiles(runs, lambda run: run.tpot_s),
        e2e=_percentiles(runs, lambda run: run.e2e_s),
        prefill_busy=interval([_busy(run, run.busy_s[: run.num_prefill]) for run in runs]),
        decode_busy=interval([_busy(run, run.busy_s[run.num_prefill :]) for run in runs]),
        goodput_per_s=interval([num_cells * each for each in goodput]),
        goodput_per_device=interval([each / devices for each in goodput]),
        goodput_per_usd=interval([each * 3600 / found.usd_per_hour for each in goodput]),
        usd_per_hour_by_seed=tuple(usd * num_cells for usd in usd_by_seed),
        ttft_curve=_curve(first.ttft_s), tpot_curve=_curve(first.tpot_s),
    )  # fmt: skip


def _busy(run: Run, busy_s: Seconds) -> float:
    return float(busy_s.mean() / run.end_of_all_s) if len(busy_s) else 0.0


def _percentiles(runs: Sequence[Run], of: Callable[[Run], Seconds]) -> Percentiles:
    found = [_finite_percentiles(of(run), (50, 90, 99)) for run in runs]
    return Percentiles(*(interval([each[i] for each in found]) for i in range(3)))


def _finite_percentiles(values: Seconds, ranks: Sequence[float]) -> list[float]:
    """Of requests that were answered; 0 where there are none."""
    answered = values[np.isfinite(values)]
    return np.percentile(answered, ranks).tolist() if len(answered) else [0.0] * len(ranks)


def _curve(values: Seconds) -> tuple[float, ...]:
    return tuple(_finite_percentiles(values, range(101)))


def windows(traffic: Traffic, worker: Worker) -> tuple[Window, ...]:
    """Equal stretches.  A prompt token's seconds are those in a full chunk of its own prompt, an answer's those in a batch
    of ``REFERENCE_BATCH`` like it."""
    edges = np.linspace(0.0, float(traffic.arrive_s[-1]) + 1e-9, NUM_WINDOWS + 1)
    where = np.clip(np.searchsorted(edges, traffic.arrive_s, side="right") - 1, 0, NUM_WINDOWS - 1)
    computed = (traffic.num_input - traffic.num_cached).astype(np.float64)
    steps = np.ceil(computed / REFERENCE_CHUNK)
    prefill_s = _step_s(
        worker, (steps, computed, computed * (traffic.num_cached + computed / 2), steps * traffic.num_input / 2 + 0.0,
                 0 * steps, 0 * steps),
    )  # fmt: skip
    context = traffic.num_input + traffic.num_output / 2.0
    together = float(REFERENCE_BATCH)
    one = np.ones_like(context)
    batch_s = _step_s(worker, (one, 0 * one, 0 * one, 0 * one, together * one, together * context))
    decode_s = batch_s / together * (traffic.num_output - 1)

    def total(values: NDArray[np.float64] | NDArray[np.int32], window: int) -> float:
        return float(values[where == window].sum(dtype=np.float64))

    return tuple(
        Window(
            float(edges[w]), int(total(traffic.num_input, w)), int(total(traffic.num_cached, w)),
            int(total(traffic.num_output, w)), total(prefill_s, w), total(decode_s, w),
        )
        for w in range(NUM_WINDOWS)
    )  # fmt: skip


def _step_s(worker: Worker, terms: tuple[NDArray[np.float64], ...]) -> NDArray[np.float64]:
    """As ``StepCost.step_s``, of many at once; experts as if all were read in each step."""
    cost = worker.cost
    additive, compute, memory = (
        sum(price * count for price, count in zip(prices, terms, strict=True))
        for prices in (cost.additive, cost.compute, cost.memory)
    )
    return np.asarray(additive + np.maximum(compute, memory + cost.expert_s * terms[0]))


def roofline(worker: Worker, dtype: str, traffic: Traffic) -> Roofline | None:
    """Where steps of the traffic's mean request lie.  None where step times were measured: those know no roofline."""
    device = worker.device
    if device.measured is not None:
        return None
    flops = device.peak_tflops[dtype] * 1e12 * worker.tp * device.assumptions.mfu
    bandwidth = device.bandwidth_gbytes_per_s * 1e9 * worker.tp * device.assumptions.mbu
    context = float(traffic.num_input.mean() + traffic.num_output.mean() / 2)
    steps: list[tuple[str, Terms]] = [
        (f"prefill, chunk of {tokens}", chunk(float(tokens), float(traffic.num_input.mean()) / 2))
        for tokens in (512, REFERENCE_CHUNK, 8192)
    ]
    steps += [(f"decode, batch of {count}", batch(count, context)) for count in (1, 8, REFERENCE_BATCH, 128)]
    points = []
    for name, terms in steps:
        _, compute, memory = worker.cost.parts(terms)
        points.append((name, compute * flops / (memory * bandwidth)))
    return Roofline(str(worker), flops, bandwidth, tuple(points))
