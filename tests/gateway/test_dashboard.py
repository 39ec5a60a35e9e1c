"""The dashboard: whose requests it shows, and the page in a real browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram

from gateway.decisions import DecisionBook
from gateway.doorkeeper import Doorkeeper
from gateway.http.app import create_app
from gateway.http.dashboard import Dashboard
from gateway.http.server import HttpServer
from gateway.recent import EndedRequest, RecentRequests
from gateway.served import ServedBook
from gateway.siblings import Memory, Siblings
from gateway.tenants import Keyring, Tenant
from gateway.view import ClusterView
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.inference.v1 import inference_pb2
from tests.gateway.scripted import MODEL, VOCABULARY, ScriptedFrontDoor

BUILD = Path(__file__).parents[2] / "build"
TILES = {
    "prefill : decode": "67 : 33", "requests": "3", "TTFT p50": "55.0 ms", "ITL p50": "55.0 ms", "KV transfer": "1.57 GB/s",
    "cache hits": "25%",
}  # fmt: skip
HOSTILE = "<img src=x onerror=document.title='taken'>"


def ended(request_id: str, prefill_worker: str = "prefill-0") -> EndedRequest:
    timeline = inference_pb2.Timeline(
        tokenize_us=900, route_us=200, ttft_us=40_000, total_us=200_000, itl_p50_us=12_000, itl_p99_us=20_000,
        prefill_worker=prefill_worker, decode_worker="decode-0", route_reason="predicted to be quickest",
        opened_us=1200, ticket_us=2500,
        prefill=common_pb2.PrefillStats(queue_us=100, compute_us=35_000, num_prompt_tokens=120, num_chunks=2),
        transfer=common_pb2.TransferStats(
            num_blocks=8, num_bytes=3 << 20, busy_us=2000, exposed_us=900, path="mapped",
            chunks=[
                common_pb2.ChunkTimes(compute_end_us=18_000, write_begin_us=18_100, write_end_us=19_000),
                common_pb2.ChunkTimes(
                    compute_begin_us=18_000, compute_end_us=35_000, write_begin_us=35_100, write_end_us=36_000
                ),
            ],
        ),
        decode=common_pb2.DecodeStats(num_steps=12, compute_us=150_000),
    )  # fmt: skip
    usage = inference_pb2.Usage(num_prompt_tokens=120, num_output_tokens=13, num_cached_tokens=30)
    finished = inference_pb2.Finished(usage=usage, timeline=timeline)
    return EndedRequest(request_id, "completed", time.monotonic(), 120, finished)


def worker(name: str, prefill: float, decode: float) -> directory_pb2.WorkerState:
    shares = {
        directory_pb2.PHASE_PREFILL: prefill, directory_pb2.PHASE_DECODE: decode,
        directory_pb2.PHASE_TRANSFER: 0.05, directory_pb2.PHASE_IDLE: 0.95 - prefill - decode,
    }  # fmt: skip
    role = common_pb2.WORKER_ROLE_PREFILL if prefill > decode else common_pb2.WORKER_ROLE_DECODE
    load = directory_pb2.WorkerLoad(
        blocks=common_pb2.BlockCounts(total=100, free=50, active=20, cached=25, lent=4, quarantined=1),
        num_running=2, prefill_tokens_per_s=900 * prefill, decode_tokens_per_s=100 * decode, transfer_bytes_per_s=2.5e9,
        phases=[
            directory_pb2.PhaseLoad(phase=phase, share=share, intensity=20.0 * (phase < 3), mfu=0.3, mbu=0.2)
            for phase, share in shares.items()
        ],
    )  # fmt: skip
    return directory_pb2.WorkerState(info=directory_pb2.WorkerInfo(worker_id=name, incarnation=1, role=role), load=load)


def make_app(recent: RecentRequests, doorkeeper: Doorkeeper | None = None) -> Any:
    registry = CollectorRegistry()
    ttft = Histogram("kvferry_ttft_seconds", "", buckets=(0.01, 0.1, 1.0), registry=registry)
    itl = Histogram("kvferry_itl_seconds", "", buckets=(0.01, 0.1, 1.0), registry=registry)
    ttft.observe(0.05)
    for _ in range(10):
        itl.observe(0.05)
    view = ClusterView()
    events = [
        directory_pb2.Event(joined=worker("prefill-0", 0.6, 0.0)),
        directory_pb2.Event(joined=worker("decode-0", 0.0, 0.3)),
    ]
    view.apply(directory_pb2.WatchResponse(revision=1, snapshot=True, events=events))
    tally = SimpleNamespace(num_in_flight=3, num_requests_total=17)
    siblings = Siblings(Memory(DecisionBook(), recent, ServedBook(0.0), tally))
    dashboard = Dashboard(view, siblings, model=MODEL, registry=registry)
    return create_app(ScriptedFrontDoor(), vocabulary=VOCABULARY, doorkeeper=doorkeeper, dashboard=dashboard)


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway")


def test_recent_requests_are_bounded_and_each_tenant_sees_its_own() -> None:
    recent = RecentRequests(max_requests=3)
    for tenant, name in (("a", "1"), ("a", "2"), ("b", "2"), ("a", "3")):
        recent.add(tenant, ended(name))
    assert [e.request_id for e in recent.of("a", 10)] == ["3", "2"]  # the oldest went
    assert [e.request_id for e in recent.of("a", 1)] == ["3"]
    assert [e.request_id for e in recent.of("b", 10)] == ["2"]
    assert recent.get("b", "3") is None
    recent.add("a", ended("2"))
    assert [e.request_id for e in recent.of("a", 10)] == ["2", "3"]  # anew, not twice


async def test_data_is_the_view_the_histograms_and_the_requests() -> None:
    recent = RecentRequests()
    recent.add("", ended("one/two?"))
    recent.add("", EndedRequest("gone", "cancelled", time.monotonic(), 5, None))
    async with client_of(make_app(recent)) as client:
        data = (await client.get("/dashboard/data")).json()
        detail = (await client.get("/dashboard/requests/one%2Ftwo%3F")).json()
        cut_short = (await client.get("/dashboard/requests/gone")).json()
        missing = await client.get("/dashboard/requests/other")
    assert (data["in_flight"], data["total"], data["ttft"]) == (
        3,
        17,
        {"bounds": [0.01, 0.1, 1.0], "counts": [0, 1, 1, 1]},
    )
    assert [w["id"] for w in data["workers"]] == ["decode-0", "prefill-0"]
    assert data["workers"][1]["phases"]["prefill"] == {"share": 0.6, "intensity": 20.0, "mfu": 0.3, "mbu": 0.2}
    assert sum(data["workers"][0]["blocks"].values()) == 100
    assert [(r["id"], r["outcome"]) for r in data["requests"]] == [("gone", "cancelled"), ("one/two?", "completed")]
    assert data["requests"][1]["cached_tokens"] == 30
    assert {phase["name"] for phase in detail["phases"]} >= {
        "tokenize",
        "prefill compute",
        "KV written",
        "decode compute",
    }
    assert cut_short["phases"] == []
    assert missing.status_code == 404


async def test_with_keys_a_tenant_sees_its_own_requests_and_a_stranger_nothing() -> None:
    keys = {"key-a": Tenant("a", b"a"), "key-b": Tenant("b", b"b")}
    keyring = Keyring((hashlib.sha256(key.encode()).hexdigest(), tenant) for key, tenant in keys.items())
    recent = RecentRequests()
    recent.add("a", ended("of-a"))
    recent.add("b", ended("of-b"))
    async with client_of(make_app(recent, Doorkeeper(keyring))) as client:
        for path in ("/dashboard/data", "/dashboard/requests/of-a", "/dashboard/requests/of-b"):
            for headers in ({}, {"authorization": "Bearer wrong"}):
                assert (await client.get(path, headers=headers)).status_code == 401
        as_a = {"authorization": "Bearer key-a"}
        data = await client.get("/dashboard/data", headers=as_a)
        assert [r["id"] for r in data.json()["requests"]] == ["of-a"]
        assert "of-b" not in data.text
        assert (await client.get("/dashboard/requests/of-a", headers=as_a)).status_code == 200
        assert (await client.get("/dashboard/requests/of-b", headers=as_a)).status_code == 404
        page = await client.get("/dashboard")  # holds no data
    assert page.status_code == 200
    assert "of-" not in page.text


async def test_the_page_needs_nothing_from_elsewhere() -> None:
    async with client_of(make_app(RecentRequests())) as client:
        page = await client.get("/dashboard")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = page.text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in text
    assert "https:" not in text
    assert "innerHTML" not in text
    assert "style=" not in text  # the policy would ignore it


class Browser:
    """Chromium, by its DevTools protocol over a pair of pipes."""

    def __init__(self, read: asyncio.StreamReader, write: asyncio.WriteTransport) -> None:
        self._read, self._write, self._number, self._session = read, write, 0, {}
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads((await self._read.readuntil(b"\0"))[:-1])
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(answer["params"]))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    async def open(self, url: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=expression, awaitPromise=True))["result"].get("value")

    async def wait_for(self, expression: str) -> None:
        look = f"const look = () => ({expression}) ? resolve() : setTimeout(look, 20); look()"
        await self.value(f"new Promise(resolve => {{ {look} }})")

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )


@asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    to_browser, our_write = os.pipe()
    our_read, from_browser = os.pipe()

    def number_pipes() -> None:
        """It wants them as 3 and 4, which may be in use by one another."""
        one, other = os.dup(to_browser), os.dup(from_browser)
        os.dup2(one, 3)
        os.dup2(other, 4)

    process = await asyncio.create_subprocess_exec(
        program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        close_fds=False, preexec_fn=number_pipes,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=32 << 20)
    incoming, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_read, "rb"))
    outgoing, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(our_write, "wb"))
    try:
        yield Browser(reader, outgoing)
    finally:
        outgoing.close()
        incoming.close()
        process.kill()
        await process.wait()


async def test_in_a_browser_at_desk_and_on_a_phone(tmp_path: Path) -> None:
    recent = RecentRequests()
    recent.add("", ended(HOSTILE, prefill_worker=""))
    recent.add("", ended("request-1"))
    server = HttpServer(make_app(recent))
    port = await server.start("127.0.0.1", 0, flag="--http-listen")
    try:
        async with asyncio.timeout(120), chromium(tmp_path) as browser:
            await browser.open(f"http://127.0.0.1:{port}/dashboard")
            await browser.wait_for("document.querySelectorAll('#requests tr').length === 2")
            tiles = await browser.value(
                "JSON.stringify([...document.querySelectorAll('.tile')].map(t => [...t.children].map(e => e.textContent)))"
            )
            assert {name: value for name, value, _ in json.loads(tiles)} == TILES
            routes = await browser.value(
                "[...document.querySelectorAll('#workers .routes')].map(e => e.innerText).join('; ')"
            )
            assert routes == (
                "of the last 2 requests 1 prefilled, 2 decoded here; of the last 2 requests 1 prefilled, 0 decoded here"
            )
            assert await browser.value("document.querySelectorAll('#workers .card').length") == 2
            assert await browser.value(
                f"[...document.querySelectorAll('#requests button')].some(b => b.innerText === {HOSTILE!r})"
            )
            await browser.value("document.querySelectorAll('#requests tr')[0].click()")
            await browser.wait_for("document.querySelectorAll('#detail .phase').length >= 6")
            assert await browser.value("document.title") == "kvferry"
            for name, width, height in (("desktop", 1280, 900), ("phone", 390, 844)):
                await browser.resize(width, height)
                # Only the table of requests may be wider than the screen, and is scrolled for itself.
                assert await browser.value("document.documentElement.scrollWidth") <= width
                shot = await browser.call("Page.captureScreenshot", format="png")
                await asyncio.to_thread(keep, f"dashboard-{name}.png", shot["data"], width)
            assert browser.complaints == []
    finally:
        await server.stop(1.0)


def keep(name: str, content: str, width: int) -> None:
    image = base64.b64decode(content)
    assert struct.unpack(">I", image[16:20])[0] == width
    BUILD.mkdir(exist_ok=True)
    (BUILD / name).write_bytes(image)
