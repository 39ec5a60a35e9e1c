"""One request's spans, of all the processes that it crosses, are one trace."""

from __future__ import annotations

import json
from typing import Any

from kvferry import Client
from tests.integration.conftest import Running


def spans(cluster: Running) -> list[dict[str, Any]]:
    """All that were printed so far, with the member that did."""
    found = []
    for member in cluster.local.members:
        for line in (cluster.local.log_dir / f"{member.name}.log").read_text(errors="replace").splitlines():
            if line.startswith("{") and '"trace_id"' in line and '"parent_id"' in line:
                found.append({**json.loads(line), "member": member.name})
    return found


def test_gateway_prefill_transfer_and_decode_are_one_trace(cluster: Running) -> None:
    before = {span["context"]["span_id"] for span in spans(cluster)}
    prompt = "A trace crosses every process that a request does. " * 12  # several chunks
    with Client(cluster.address) as client:
        client.generate(prompt, max_tokens=4, temperature=0).result()

    def new() -> list[dict[str, Any]]:
        return [span for span in spans(cluster) if span["context"]["span_id"] not in before]

    def roots() -> list[dict[str, Any]]:
        return [span for span in new() if span["name"].endswith("InferenceService/Generate")]

    cluster.wait_until(lambda: len(roots()) == 1, 10, "the request's own span has ended")
    (root,) = roots()
    trace_id = root["context"]["trace_id"]

    def trace() -> list[dict[str, Any]]:
        return [span for span in new() if span["context"]["trace_id"] == trace_id]

    def complete() -> bool:
        names = {span["name"].rsplit("/", 1)[-1] for span in trace()}
        return {"Generate", "Prefill", "kv_write", "CommitTransfer", "Decode"} <= names

    cluster.wait_until(complete, 10, f"all spans of {sorted({span['name'] for span in new()})} are of one trace")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for span in trace():
        by_name.setdefault(span["name"].rsplit("/", 1)[-1], []).append(span)
    (prefill,), (decode,), (commit,) = by_name["Prefill"], by_name["Decode"], by_name["CommitTransfer"]
    writes = by_name["kv_write"]
    assert [s["member"] for s in (root, prefill, decode, commit)] == ["gateway", "prefill-0", "decode-0", "decode-0"]
    assert {s["parent_id"] for s in (prefill, decode)} == {root["context"]["span_id"]}
    assert {s["parent_id"] for s in (*writes, commit)} == {prefill["context"]["span_id"]}
    assert len(writes) > 1
    assert all(write["attributes"]["kvferry.num_bytes"] > 0 for write in writes)
    assert not [span for span in trace() if "every process" in json.dumps(span)], "a span tells of the prompt"
