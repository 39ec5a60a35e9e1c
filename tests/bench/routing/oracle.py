"""Routing by one who knows everything: what each worker has and does, how long steps take, and who will ask what when.

Each option of each request is tried: the process forks, the child takes the option and goes on for ``horizon_s`` of virtual
time with whatever arrives meanwhile, and tells how long callers waited.  The option with the shortest waits is taken.  (A
rollout, after Bertsekas and Tsitsiklis: the requests to come are routed by kv-aware with a fresh view and, as short
waits are all that is wanted, a --stall-weight of 1.)  It is for clusters without the gateway's line: an option that is
taken is taken at once.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gateway.candidates import Candidate, Role
from gateway.costs import Costs, Demand, Option
from gateway.routing import Policy, Route
from services.planner.simulator.arrivals import Arrival, Served
from services.planner.simulator.cluster import ByPolicy, Cluster

Waits = Callable[[Served], float]


@dataclass(slots=True)
class Oracle:
    """``waits``: what it wants to be short, of each request.  For one run."""

    waits: Waits
    horizon_s: float
    _cluster: Cluster = field(init=False)
    _usual: ByPolicy = field(default_factory=lambda: ByPolicy(Policy.KV_AWARE, stall_weight=1.0))
    _pipe: int | None = None  # in a child: where it tells what it found

    def run(self, cluster: Cluster, arrivals: Iterable[Arrival]) -> list[Served]:
        """As the cluster's, which must choose by this oracle."""
        self._cluster = cluster
        try:
            return cluster.run(arrivals)
        finally:
            if self._pipe is not None:
                os._exit(1)  # a child that failed must not go on as its parent

    def __call__(self, candidates: Sequence[Candidate], demand: Demand, request_id: str) -> Route:
        usual = self._usual(candidates, demand, request_id)
        if self._pipe is not None:
            return usual
        options = _options(candidates, demand)
        now_s = self._cluster.queue.now_s
        pipes = []
        for option in options:
            reading, writing = os.pipe()
            if os.fork() == 0:
                # Goes on as the cluster's run, in which this option was chosen, and never comes back from it.
                self._pipe = writing
                self._cluster.queue.at(now_s + self.horizon_s, lambda: self._tell(now_s))
                return _route(option, demand)
            os.close(writing)
            pipes.append(reading)
        found = [_heard(reading) for reading in pipes]
        for _ in options:
            os.wait()
        best = min(range(len(options)), key=lambda n: (found[n], options[n].rank))
        return _route(options[best], demand)

    def _tell(self, since_s: float) -> None:
        assert self._pipe is not None
        os.write(self._pipe, struct.pack("d", sum(self.waits(served) for served in self._cluster.waits(since_s))))
        os._exit(0)


def _options(candidates: Sequence[Candidate], demand: Demand) -> list[Option]:
    """With cached blocks pulled where that pays, and without."""
    usable = sorted(candidates, key=lambda c: c.key.worker_id)
    decoders = [c for c in usable if c.role is Role.DECODE]
    writers = [c for c in usable if c.role is Role.PREFILL]
    found = []
    for costs in (Costs(usable, demand), Costs(usable, demand, pulls=False)):
        for decode in decoders:
            found += [costs.alone(decode), *(costs.split(decode, writer) for writer in writers)]
    return [option for n, option in enumerate(found) if n < len(found) // 2 or option not in found[: len(found) // 2]]


def _route(option: Option, demand: Demand) -> Route:
    return Route(Policy.KV_AWARE, demand, option, (option,), ())


def _heard(reading: int) -> float:
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    if len(told) != 8:
        raise RuntimeError("a trial of an option died before it told what it found")
    return float(struct.unpack("d", told)[0])
