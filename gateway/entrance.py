"""Lets requests in to the workers as these have room, in the order of the line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import Gauge

from gateway.admission import Objectives
from gateway.line import Line
from gateway.request import Event, NotRouted, Routed
from gateway.routing import Route
from gateway.run import Run
from gateway.tenants import Tenant
from kvferry.errors import OverloadedError

# How often the line looks whether workers have reported room.
LOOK_INTERVAL_S = 0.02

_IN_LINE = Gauge(
    "kvferry_requests_in_line",
    "Requests that wait in the gateway for workers to have room",
    multiprocess_mode="livesum",
)


class Entrance:
    """Owned by one event loop."""

    def __init__(
        self, objectives: Objectives, *, route: Callable[[Run], Route | NotRouted],
        take: Callable[[Run, Route], Routed], num_lanes: Callable[[], int],
    ) -> None:  # fmt: skip
        """``route`` says where a request would go by the view of the moment, and changes nothing; ``take`` sends it
        there; ``num_lanes`` is the number of workers that compute prompts."""
        self._objectives = objectives
        self._route = route
        self._take = take
        self._num_lanes = num_lanes
        self._line: Line[Run] = Line()
        self._looks_again: asyncio.Handle | None = None

    def served(self, tenant: Tenant, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """It counts for whose turn is next."""
        self._line.served(tenant.name, num_prompt_tokens, num_output_tokens, tenant.weight)

    def enter(self, run: Run) -> Event | None:
        """A request's first route.  None: it waits in the line, and the event comes by itself."""
        tenant, priority, now_s = run.job.tenant.name, run.job.priority, time.monotonic()

        def due_s(route: Route) -> float:
            return now_s + self._objectives.patience_s(route)

        def wait_s(route: Route) -> float:
            if not self._line:
                return 0.0
            return self._line.wait_s(tenant, priority, due_s=due_s(route), num_lanes=self._num_lanes())

        routed = self._route_in_time(run, wait_s)
        if isinstance(routed, NotRouted):
            return routed
        if not self._line and self._objectives.has_room(routed):
            return self._take(run, routed)
        work_s = routed.chosen.terms.work_s
        run.ticket = self._line.join(run, tenant, priority=priority, work_s=work_s, now_s=now_s, due_s=due_s(routed))
        _IN_LINE.set(len(self._line))
        if self._line.first() is run.ticket:
            self.look_soon()  # there may be room for it that was too little for the first before it
        else:
            self._look_later()
        return None

    def _route_in_time(self, run: Run, wait_s: Callable[[Route], float], num_behind: int = 0) -> Route | NotRouted:
        """For a request that has waited for so long, or would have to, with so many behind it."""
        routed = self._route(run)
        if not isinstance(routed, NotRouted):
            routed = self._objectives.with_room(routed, num_behind) or routed
            try:
                self._objectives.check(routed, wait_s(routed))
            except OverloadedError as error:
                return NotRouted(error)
        return routed

    def look_soon(self) -> None:
        """Whether the first of the line may go: once the loop comes to it, however often it is asked."""
        if self._line:
            self._look_in(0.0)

    def _look_later(self) -> None:
        """What the workers report changes unseen."""
        if self._line and self._looks_again is None:
            self._look_in(LOOK_INTERVAL_S)

    def _look_in(self, delay_s: float) -> None:
        if self._looks_again is not None:
            self._looks_again.cancel()
        self._looks_again = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        """Lets in the first of the line if it may go.  It counts as under way once its task has run, which is before the
        next look."""
        self._looks_again = None
        try:
            if ticket := self._line.first():
                run, now_s = ticket.item, time.monotonic()
                waited_s = now_s - ticket.came_s
                event: Event | Route = self._route_in_time(run, lambda _: waited_s, len(self._line) - 1)
                if isinstance(event, Route):
                    if not self._objectives.has_room(event):
                        return
                    event = self._take(run, event)
                self.leave(run, now_s)
                run.put(event)
                self.look_soon()
        finally:
            self._look_later()

    def leave(self, run: Run, turn_s: float | None = None) -> None:
        """``turn_s``: when its turn came; None for one that gives up.  Idempotent."""
        if run.ticket is not None:
            run.trace.line_s = time.monotonic() - run.ticket.came_s
            self._line.leave(run.ticket, turn_s)
            run.ticket = None
            _IN_LINE.set(len(self._line))
