"""Whether a routed request goes to its workers now, waits in the gateway's line, or is refused.  Pure.

Workers are kept busy and no more: what would only wait there waits here, where tenants take turns and where a request that
comes too late for its objective can still be refused before anything was computed for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from gateway.routing import Policy, Route
from kvferry.errors import OverloadedError

# In the line a request lets others go first until it has waited so many times what its own prompt takes.
PATIENCE = 4.0
_MIN_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Objectives:
    """``max_queue_s``: so much prompt work may wait on a worker.  Then what requests shall get: time to first token, and
    time between tokens; infinite where nothing was promised.  ``patience``: see ``patience_s``."""

    max_queue_s: float = 0.25
    ttft_s: float = inf
    itl_s: float = inf
    patience: float = PATIENCE

    @property
    def promises_gaps(self) -> bool:
        """Then a first token waits until its answer goes on."""
        return self.itl_s < inf

    def has_room(self, route: Route) -> bool:
        """False: it shall wait.  Where nothing was measured yet, nobody waits for a guess; and a decode worker that has
        nothing to do takes what comes."""
        computer, decode = route.prefill or route.decode, route.decode
        if computer.rates.prefill_tokens_per_s > 0 and route.chosen.terms.queue_s > self.max_queue_s:
            return False
        if decode.num_requests == 0:
            return True
        return not route.chosen.full and not (decode.rates.step_base_s > 0 and route.step_s > self.itl_s)

    def with_room(self, route: Route, num_behind: int) -> Route | None:
        """The route; or the best of its options that has room, where that costs no more than as many as wait behind it in
        the line would lose if it waited for the best worker of all.  None: it shall wait.  Policies that
        reckon no costs name one worker alone."""
        if self.has_room(route):
            return route
        if route.policy is not Policy.KV_AWARE:
            return None
        terms = route.chosen.terms
        most_s = terms.total_s + num_behind * terms.queue_s
        other = next((by for by in map(route.by, route.options) if self.has_room(by)), None)
        return other if other is not None and other.chosen.terms.total_s <= most_s else None

    def patience_s(self, route: Route) -> float:
        """For how long it lets those go first that come later and have less to compute: short prompts that all waited
        behind a long one would come to their decode worker at once.  In proportion to its own prompt, a bound that
        the shortest first would not have (stretch; Bender, Chakrabarti and Muthukrishnan, "Flow and stretch metrics
        for scheduling continuous job streams", SODA 1998).  Less where its objective leaves less, with the queue on a
        worker."""
        spare_s = self.ttft_s - self._own_s(route) - self.max_queue_s
        return max(0.0, min(self.patience * route.chosen.terms.work_s, spare_s))

    def check(self, route: Route, wait_s: float) -> None:
        """Raises OverloadedError (TTFT_SLO) for a request that, after ``wait_s`` in the line, would get its first token too
        late.  One whose own prompt takes longer than the objective is refused only when it would have to wait besides:
        coming again later would not help it."""
        terms, own_s = route.chosen.terms, self._own_s(route)
        late_s = wait_s + terms.queue_s - max(self.ttft_s - own_s, self.max_queue_s)
        if late_s > 0:
            raise OverloadedError(
                f"the first token would come after about {wait_s + terms.queue_s + own_s:.1f} s, and {self.ttft_s:g} s is "
                "this gateway's objective",
                reason="TTFT_SLO",
                retry_after_s=max(_MIN_RETRY_S, late_s),
            )

    @staticmethod
    def _own_s(route: Route) -> float:
        """From a prompt's turn to its first token."""
        return route.chosen.terms.work_s + route.chosen.terms.ship_s + route.step_s
