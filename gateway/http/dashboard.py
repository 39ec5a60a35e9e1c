"""GET /dashboard: the cluster at a glance, as one page and the JSON that it asks for every other second.

The page holds no data.  Its data is below /dashboard/, where a key is wanted as below /v1 if keys are: the cluster's state
is for every tenant, as over gRPC, and requests are for the tenant whose they are.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.http.errors import json_response
from gateway.recent import MAX_REQUESTS, EndedRequest
from gateway.siblings import Siblings
from gateway.view import ClusterView
from kvferry import __version__, _convert
from kvferry._phases import phases
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.errors import NotFoundError

PAGE = Path(__file__).with_name("dashboard.html")
MAX_LISTED = 100
_PHASES = {
    directory_pb2.PHASE_PREFILL: "prefill",
    directory_pb2.PHASE_DECODE: "decode",
    directory_pb2.PHASE_TRANSFER: "transfer",
    directory_pb2.PHASE_IDLE: "idle",
}
_STATES = ("active", "cached", "lent", "quarantined", "free")


class Dashboard:
    """Belongs to the application's event loop."""

    def __init__(
        self,
        view: ClusterView,
        siblings: Siblings,
        *,
        model: str,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """``registry``: with the gateway's histograms."""
        self._view = view
        self._siblings = siblings
        self._model = model
        self._registry = registry
        self._page = PAGE.read_bytes()
        self._headers = {
            "content-security-policy": _policy(self._page.decode()),
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    def routes(self) -> list[Route]:
        return [
            Route("/dashboard", self._show),
            Route("/dashboard/data", self._data),
            Route("/dashboard/requests/{request_id:path}", self._request),
        ]

    async def _show(self, _: Request) -> Response:
        return Response(self._page, media_type="text/html; charset=utf-8", headers=self._headers)

    async def _data(self, request: Request) -> Response:
        now_s = time.monotonic()
        age_s = self._view.age_s
        counts = await self._siblings.count()
        recent = await self._siblings.list_ended(request.state.tenant.name, MAX_LISTED)
        content = {
            "model": self._model,
            "version": __version__,
            "view_age_s": None if age_s == float("inf") else age_s,
            "in_flight": counts.num_in_flight,
            "total": counts.num_total,
            "workers": [_worker(self._view.workers[name]) for name in sorted(self._view.workers)],
            "ttft": self._histogram("kvferry_ttft_seconds"),
            "itl": self._histogram("kvferry_itl_seconds"),
            "requests": [_listed(ended, now_s) for ended in recent],
        }
        return json_response(content, headers={"cache-control": "no-store"})

    async def _request(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        ended = await self._siblings.find_ended(request.state.tenant.name, request_id)
        if ended is None:
            raise NotFoundError(
                f"request {request_id[:128]!r} is not among the last {MAX_REQUESTS} that ended at {self._siblings.who}",
                reason="UNKNOWN_REQUEST",
            )
        return json_response(_detail(ended), headers={"cache-control": "no-store"})

    def _histogram(self, name: str) -> dict[str, list[float]]:
        """Since start; the last bound, infinity, is not among the bounds."""
        found = [
            (float(sample.labels["le"]), sample.value)
            for family in self._registry.collect()
            if family.name == name
            for sample in family.samples
            if sample.name == f"{name}_bucket"
        ]
        return {"bounds": [le for le, _ in found if le != float("inf")], "counts": [count for _, count in found]}


def _worker(state: directory_pb2.WorkerState) -> dict[str, Any]:
    info, load = state.info, state.load
    return {
        "id": info.worker_id,
        "role": common_pb2.WorkerRole.Name(info.role).removeprefix("WORKER_ROLE_").lower(),
        "draining": load.draining,
        "running": load.num_running,
        "waiting": load.num_waiting,
        "queued_tokens": load.num_queued_prefill_tokens,
        "prefill_tokens_per_s": load.prefill_tokens_per_s,
        "decode_tokens_per_s": load.decode_tokens_per_s,
        "transfer_bytes_per_s": load.transfer_bytes_per_s,
        "pull_bytes_per_s": load.pull_bytes_per_s,
        "blocks": {name: getattr(load.blocks, name) for name in _STATES},
        "host_blocks": load.num_host_blocks,
        "phases": {
            _PHASES[phase.phase]: {
                "share": phase.share,
                "intensity": phase.intensity,
                "mfu": phase.mfu,
                "mbu": phase.mbu,
            }
            for phase in load.phases
            if phase.phase in _PHASES
        },
    }


def _listed(ended: EndedRequest, now_s: float) -> dict[str, Any]:
    listed: dict[str, Any] = {
        "id": ended.request_id,
        "outcome": ended.outcome,
        "age_s": now_s - ended.ended_s,
        "prompt_tokens": ended.num_prompt_tokens,
    }
    if (finished := ended.finished) is not None:
        timeline = finished.timeline
        listed |= {
            "output_tokens": finished.usage.num_output_tokens,
            "cached_tokens": finished.usage.num_cached_tokens,
            "ttft_s": timeline.ttft_us / 1e6,
            "total_s": timeline.total_us / 1e6,
            "itl_p50_s": timeline.itl_p50_us / 1e6,
            "prefill_worker": timeline.prefill_worker,
            "decode_worker": timeline.decode_worker,
            "transfer_bytes": timeline.transfer.num_bytes,
            "transfer_s": timeline.transfer.busy_us / 1e6,
            "retries": timeline.num_retries,
        }
    return listed


def _detail(ended: EndedRequest) -> dict[str, Any]:
    if ended.finished is None:
        return {"id": ended.request_id, "route_reason": "", "total_s": 0.0, "phases": []}
    timeline = _convert.timeline(ended.finished.timeline)
    return {
        "id": ended.request_id,
        "route_reason": timeline.route_reason,
        "total_s": timeline.total_s,
        "phases": [{"name": phase.name, "spans": phase.spans} for phase in phases(timeline)],
    }


def _policy(page: str) -> str:
    """What the page may do: run and look as it is written here, and ask this gateway."""
    scripts, styles = ([_digest(part) for part in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)]
                       for tag in ("script", "style"))  # fmt: skip
    return (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src {' '.join(styles)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(part: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
