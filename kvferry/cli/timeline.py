"""A request's timeline: bars on one axis of time, then rows of stage, time and detail."""

from __future__ import annotations

from kvferry._phases import phases
from kvferry.cli import bars, output
from kvferry.types import PrefillStats, PullStats, Timeline, Usage

HEADINGS = ("stage", "time", "detail")


def show(timeline: Timeline, usage: Usage) -> None:
    bars.show("timeline", phases(timeline), timeline.total_s)
    output.show_table("where the time went", HEADINGS, rows(timeline, usage), numeric=frozenset({1}))


def rows(timeline: Timeline, usage: Usage) -> list[tuple[str, str, str]]:
    """What the gateway and the workers measured.  Stages overlap: blocks travel while the next chunk is computed, and
    the first token does not wait for them unless the gateway promises gaps."""
    prefill, transfer, decode = timeline.prefill, timeline.transfer, timeline.decode
    made = [
        ("tokenize", duration(timeline.tokenize_s), f"{usage.num_prompt_tokens} prompt tokens"),
        ("route", duration(timeline.route_s), timeline.route_reason),
    ]
    if prefill is not None:
        where = timeline.prefill_worker or f"{timeline.decode_worker} (computed where it is decoded)"
        if pull := prefill.pull:
            made.append(("pull", duration(pull.elapsed_s), _pulled(pull)))
        made += [
            ("prefill queue", duration(prefill.queue_s), where),
            (
                "prefill compute",
                duration(prefill.compute_s),
                f"{prefill.num_prompt_tokens - prefill.num_cached_tokens} tokens in {prefill.num_chunks} chunk(s), "
                f"{prefill.num_cached_tokens} found in the cache",
            ),
        ]
    made.append(("first token (TTFT)", duration(timeline.ttft_s), "from arrival at the gateway"))
    if transfer is not None:
        speed = "" if transfer.bytes_per_s is None else f" at {transfer.bytes_per_s / 1e9:.2f} GB/s"
        made += [
            (
                "KV written",
                duration(transfer.busy_s),
                f"{transfer.num_blocks} blocks, {transfer.num_bytes:,} bytes ({size(transfer.num_bytes)}) "
                f"by {transfer.path}{speed}; {_share(transfer.num_hidden_bytes, transfer.num_bytes)} while the prompt was "
                "computed",
            ),
            (
                "exposed transfer",
                duration(transfer.exposed_s),
                f"from the last chunk to the commit{_of_compute(transfer.exposed_s, prefill)}",
            ),
        ]
        if transfer.verify_s:
            made.append(("of it, verifying", duration(transfer.verify_s), "digests compared on both sides"))
    if timeline.handover_s is not None:
        made.append(
            ("handover", duration(timeline.handover_s), "at most, from the last chunk to the first decode step")
        )
    if decode is not None:
        if transfer is not None:
            made.append(("wait for KV", duration(decode.wait_for_kv_s), "from the ticket to the commit"))
        again = f", {decode.num_preemptions} preemption(s)" if decode.num_preemptions else ""
        drafts = ""
        if decode.num_drafted_tokens:
            drafts = f", {decode.num_accepted_tokens} of {decode.num_drafted_tokens} drafted tokens accepted"
        detail = f"{timeline.decode_worker}, {decode.num_steps} steps{drafts}{again}"
        made.append(("decode compute", duration(decode.compute_s), detail))
    made += [
        ("ITL p50", duration(timeline.itl_p50_s), "between tokens"),
        ("ITL p99", duration(timeline.itl_p99_s), ""),
        ("total", duration(timeline.total_s), f"{usage.num_output_tokens} tokens{_rate(timeline, usage)}"),
    ]
    if timeline.num_retries:
        made.append(("retries", str(timeline.num_retries), "started over on other workers"))
    return made


def _pulled(pull: PullStats) -> str:
    if pull.outcome != "pulled":
        return f"nothing from {pull.holder}: {pull.outcome}"
    return f"{pull.num_blocks} blocks, {pull.num_bytes:,} bytes ({size(pull.num_bytes)}) from {pull.holder}"


def duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"


def size(nbytes: float) -> str:
    """In the largest binary unit of which there is at least one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while nbytes >= 1024 and power < len(units) - 1:
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.1f} {units[power]}" if power else f"{nbytes:.0f} B"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "none"


def _of_compute(seconds: float, prefill: PrefillStats | None) -> str:
    return "" if prefill is None or not prefill.compute_s else f", {_share(seconds, prefill.compute_s)} of the compute"


def _rate(timeline: Timeline, usage: Usage) -> str:
    decoding_s = timeline.total_s - timeline.ttft_s
    if usage.num_output_tokens < 2 or decoding_s <= 0:
        return ""
    return f", {(usage.num_output_tokens - 1) / decoding_s:.1f} per second after the first"
