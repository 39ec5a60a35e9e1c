"""The plan: cheapest fleets of each kind, what they are like, what would change them, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil

import numpy as np

from kvferry.bench.slo import Slo
from kvferry.errors import InvalidRequestError
from services.planner import figures
from services.planner.designs import Kind, Size, usd_per_hour, workers
from services.planner.hardware import Assumptions, Catalogue, Device, Worker
from services.planner.models import ModelShape
from services.planner.report import Load, Option, Outcome, Report, Sensitivity
from services.planner.search import Found, cheapest, size_again
from services.planner.sizing import Sizing
from services.planner.step_cost import chunk
from services.planner.traffic import Traffic
from services.planner.verdict import judge

SHARES = (0.9, 0.99)
# More workers are planned as several equal fleets: requests choose among enough of them as it is.
CELL_WORKERS = 48
SCENARIOS = ("links between nodes 10 times slower", "prompts twice as long", "half of what was not cached is cached")

Tell = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """``traffic``: the trace's; ``rate``: of Poisson arrivals in place of its own times.  ``devices``: names in the
    catalogue.  No more than ``most_requests`` are simulated: the busiest stretch, as many at a ``rate``.
    ``patiences``: of the gateway's line, to choose from."""

    trace: str
    traffic: Traffic
    rate: float | None
    model: ModelShape
    dtype: str
    catalogue: Catalogue
    devices: Sequence[str]
    slo: Slo
    num_seeds: int
    most_requests: int
    sensitivity: bool
    patiences: Sequence[float]


def make_plan(request: Request, tell: Tell) -> Report:
    """``tell`` hears of how much is done, 0 to 1, and what is tried.  Raises InvalidRequestError where the model runs on
    none of the devices."""
    among = _workers(request, request.catalogue)
    busiest = request.traffic.busiest(request.most_requests)
    num_cells = _num_cells(busiest, request.rate or busiest.rate, among)
    seeds = [_seeded(request, busiest, seed, num_cells) for seed in range(request.num_seeds)]
    progress = _Progress(tell, 2 * len(SHARES) + (len(SCENARIOS) if request.sensitivity else 0))
    sizings = [Sizing(traffic, request.slo, progress.simulated) for traffic in seeds]
    outcomes: list[Outcome] = []
    base: Mapping[Kind, Found | None] = {}
    for share in SHARES:
        by_order = _by_order(sizings[0], request, among, share, progress.begin())
        base = base or _cheapest_of(by_order)
        doing = progress.begin()
        for kind in Kind:
            doing(f"{kind.value}: {len(seeds)} seeds")
            # Which order is the cheaper one is not for one arrival order to say.
            options = [
                option
                for found in by_order
                if (one := found[kind]) is not None and (option := _option(one, sizings, share, num_cells)) is not None
            ]
            best = min(options, key=lambda o: (round(o.usd_per_hour, 6), -o.attained.mean), default=None)
            outcomes.append(Outcome(kind.value, share, best))
    sensitivity = [_row("as it is", base, num_cells)]
    if request.sensitivity:
        sensitivity += _sensitivity(request, busiest, num_cells, progress)
    reference = _reference(base, among)
    verdict, strict_verdict = (judge(outcomes, share, _why_none(request, seeds[0], among)) for share in SHARES)
    return Report(
        model=request.model.name, dtype=request.dtype,
        slo={key: value for key, value in asdict(request.slo).items() if value is not None},
        load=_load(request, busiest, seeds[0], num_cells),
        verdict=verdict, strict_verdict=strict_verdict,
        outcomes=tuple(outcomes), sensitivity=tuple(sensitivity),
        windows=figures.windows(request.traffic, reference),
        roofline=figures.roofline(reference, request.dtype, seeds[0]),
        assumptions=tuple(_assumptions(request)), num_seeds=request.num_seeds, num_simulated=progress.num_simulated,
    )  # fmt: skip


class _Progress:
    """Of ``num_parts`` parts, none of which knows how long it takes."""

    def __init__(self, tell: Tell, num_parts: int) -> None:
        self._tell, self._num_parts = tell, num_parts
        self._part = -1
        self._what = ""
        self.num_simulated = 0
        self._in_part = 0

    def begin(self) -> Callable[[str], None]:
        self._part += 1
        self._in_part = 0
        return self._doing

    def simulated(self) -> None:
        self.num_simulated += 1
        self._in_part += 1
        self._say()

    def _doing(self, what: str) -> None:
        self._what = what
        self._say()

    def _say(self) -> None:
        # A part takes some hundred simulations: it nears its end and never passes it.
        within = self._in_part / (self._in_part + 100)
        self._tell((self._part + within) / self._num_parts, self._what)


def _by_order(
    sizing: Sizing, request: Request, among: Sequence[Worker], share: float, doing: Callable[[str], None]
) -> list[Mapping[Kind, Found | None]]:  # fmt: skip
    """The cheapest with each order of the line."""
    return [cheapest(sizing, among, patience, share, doing) for patience in request.patiences]


def _cheapest_of(by_order: Sequence[Mapping[Kind, Found | None]]) -> dict[Kind, Found | None]:
    each = {kind: [one for found in by_order if (one := found[kind]) is not None] for kind in Kind}
    return {kind: min(found, key=lambda one: one.usd_per_hour, default=None) for kind, found in each.items()}


def _workers(request: Request, catalogue: Catalogue) -> list[Worker]:
    found = workers(request.model, catalogue, request.dtype, request.devices)
    if not found:
        raise InvalidRequestError(
            f"{request.model.name} in {request.dtype} runs on none of {', '.join(request.devices)}: too little "
            "memory on eight of one node, or no such type; name others with --devices or in --hardware, or another --dtype"
        )
    return found


def _seeded(request: Request, busiest: Traffic, seed: int, num_cells: int) -> Traffic:
    """What one of the equal fleets is planned for."""
    if request.rate is None:
        return busiest.shuffled(seed).in_turn(num_cells)
    return busiest.poisson(request.rate, seed, request.most_requests).in_turn(num_cells)


def _num_cells(traffic: Traffic, rate: float, among: Sequence[Worker]) -> int:
    """By the workers that prompts alone would take, of those with the most FLOP/s for a dollar."""

    def token_s(worker: Worker) -> float:
        return worker.cost.step_s(chunk(2048.0)) / 2048

    worker = min(among, key=lambda worker: token_s(worker) * worker.usd_per_hour)
    computed = float((traffic.num_input - traffic.num_cached).mean())
    return max(1, ceil(computed * rate * token_s(worker) / CELL_WORKERS))


def _option(found: Found, sizings: Sequence[Sizing], share: float, num_cells: int) -> Option | None:
    """As large as all seeds need it.  None where one of them is not served by any number of workers."""
    each = [found, *(size_again(sizing, found, share) for sizing in sizings[1:])]
    sized = [one for one in each if one is not None]
    if len(sized) < len(each):
        return None
    size = Size(max(one.size.num_prefill for one in sized), max(one.size.num_decode for one in sized))
    largest = max(sized, key=lambda one: one.usd_per_hour)
    # One of them may do for all, and be cheaper than the most of each role.
    if any(sizing.attained(found.design, largest.size).all < share for sizing in sizings):
        largest = Found(found.design, size, usd_per_hour(found.design, size))
    runs = [sizing.run(largest.design, largest.size) for sizing in sizings]
    return figures.option(largest, runs, sizings[0].slo, share, [one.usd_per_hour for one in sized], num_cells)


def _sensitivity(request: Request, busiest: Traffic, num_cells: int, progress: _Progress) -> Iterator[Sensitivity]:
    slow = request.catalogue.with_slower_links(10.0)
    plain = _seeded(request, busiest, 0, num_cells)
    cases = (
        (request.catalogue if i else slow, (plain, plain.with_longer_prompts(2), plain.with_more_hits(0.5))[i])
        for i in range(len(SCENARIOS))
    )
    for what, (catalogue, traffic) in zip(SCENARIOS, cases, strict=True):
        doing = progress.begin()
        sizing = Sizing(traffic, request.slo, progress.simulated)

        def tell(tried: str, what: str = what, doing: Callable[[str], None] = doing) -> None:
            doing(f"if {what}: {tried}")

        by_order = _by_order(sizing, request, _workers(request, catalogue), SHARES[0], tell)
        yield _row(what, _cheapest_of(by_order), num_cells)


def _row(what: str, found: Mapping[Kind, Found | None], num_cells: int) -> Sensitivity:
    usd = {kind.value: one.usd_per_hour * num_cells if one else None for kind, one in found.items()}
    splits = [one.usd_per_hour for kind, one in found.items() if one is not None and kind is not Kind.COLOCATED]
    colocated = found[Kind.COLOCATED]
    saves = 1 - min(splits) / colocated.usd_per_hour if splits and colocated is not None else None
    return Sensitivity(what, usd, saves)


def _reference(found: Mapping[Kind, Found | None], among: Sequence[Worker]) -> Worker:
    """The colocated fleet's worker, or else the one with the cheapest device."""
    colocated = found[Kind.COLOCATED]
    return colocated.design.decode if colocated else min(among, key=lambda worker: worker.device.usd_per_hour)


def _why_none(request: Request, traffic: Traffic, among: Sequence[Worker]) -> str:
    """How long the prompt at the lowest share takes when it is alone, on the fastest worker."""
    length = float(np.quantile(traffic.num_input - traffic.num_cached, SHARES[0]))
    fastest = min(among, key=lambda worker: worker.cost.step_s(chunk(length)))
    return (
        f"On the fastest worker, {fastest}, with nobody else there, a prompt at the 90th percentile, {length:.0f} tokens "
        f"to compute, takes {fastest.cost.step_s(chunk(length)):.2g} s; loosen --slo, or name faster hardware."
    )


def _load(request: Request, busiest: Traffic, planned: Traffic, num_cells: int) -> Load:
    return Load(
        request.trace, len(request.traffic), len(planned), planned.duration_s / num_cells, planned.rate * num_cells,
        float(busiest.num_input.mean()), float(busiest.num_output.mean()), busiest.hit_rate, num_cells,
    )  # fmt: skip


def _assumptions(request: Request) -> Iterator[tuple[str, str]]:
    catalogue = request.catalogue
    yield "catalogue dated", catalogue.dated
    yield "patience of the gateway's line", " or ".join(f"{patience:g}" for patience in request.patiences)
    for field in fields(Assumptions):
        yield field.name, f"{getattr(catalogue.assumptions, field.name):g}"
    for name in request.devices:
        device = catalogue.devices[name]
        if device.measured is not None:
            yield name, f"measured step times; ${device.usd_per_hour:g}/h{_rented(device)}"
            continue
        peak = device.peak_tflops.get(request.dtype)
        own = "".join(
            f", {field.name} {getattr(device.assumptions, field.name):g}"
            for field in fields(Assumptions)
            if getattr(device.assumptions, field.name) != getattr(catalogue.assumptions, field.name)
        )
        yield (
            name,
            (
                f"{'no' if peak is None else f'{peak:g} TFLOPS'} {request.dtype}, {device.bandwidth_gbytes_per_s:g} GB/s, "
                f"{device.memory_gbytes:g} GB, link {device.link_gbytes_per_s:g} GB/s, in the node "
                f"{device.node_link_gbytes_per_s:g} GB/s, ${device.usd_per_hour:g}/h{_rented(device)}{own}"
            ),
        )


def _rented(device: Device) -> str:
    return f", {device.rented} at a time" if device.rented else ""
