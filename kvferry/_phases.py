"""When a request's phases were, on one axis that begins at its arrival at the gateway.  Pure.

Each process measured by its own clock, so what happened on a worker is placed by the gateway's sending of the prompt:
the way of a message, well below a millisecond on one host, is lost between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.types import Timeline

Span = tuple[float, float]  # seconds, begin and end


@dataclass(frozen=True, slots=True)
class Phase:
    """``spans`` in order, none of them inside another."""

    name: str
    spans: tuple[Span, ...]


def phases(timeline: Timeline) -> list[Phase]:
    """Those that took place, in the order in which they began.  Names are those of the table's rows."""
    opened_s, sent_s = timeline.opened_s, timeline.ticket_s
    made = [
        Phase("tokenize", ((0.0, timeline.tokenize_s),)),
    ]
    if timeline.line_s:
        made.append(Phase("line", ((opened_s - timeline.route_s - timeline.line_s, opened_s - timeline.route_s),)))
    made.append(Phase("route", ((opened_s - timeline.route_s, opened_s),)))
    prefill, transfer, decode = timeline.prefill, timeline.transfer, timeline.decode
    decoding_s = timeline.ttft_s
    if sent_s is not None:
        made.append(Phase("ticket", ((opened_s, sent_s),)))
    if prefill is not None:
        queued_s = opened_s if sent_s is None else sent_s
        if prefill.pull is not None:
            received_s, queued_s = queued_s, queued_s + prefill.pull.elapsed_s
            made.append(Phase("pull", ((received_s, queued_s),)))
        begun_s = queued_s + prefill.queue_s
        chunks = () if transfer is None else transfer.chunks
        computed = [(begun_s + c.compute_begin_s, begun_s + c.compute_end_s) for c in chunks]
        written = [
            (begun_s + c.write_begin_s, begun_s + c.write_end_s)
            for c in chunks
            if c.write_begin_s is not None and c.write_end_s is not None
        ]
        computed = computed or [(begun_s, begun_s + prefill.compute_s)]
        ended_s = computed[-1][1]
        made += [Phase("prefill queue", ((queued_s, begun_s),)), Phase("prefill compute", tuple(computed))]
        if transfer is not None:
            made += [
                Phase("KV written", tuple(written)),
                Phase("exposed transfer", ((ended_s, ended_s + transfer.exposed_s),)),
            ]
            decoding_s = ended_s + (timeline.handover_s or transfer.exposed_s)
        else:
            decoding_s = ended_s
    made.append(Phase("first token (TTFT)", ((timeline.ttft_s, timeline.ttft_s),)))
    if decode is not None and decode.num_steps:
        made.append(Phase("decode compute", ((decoding_s, max(decoding_s, timeline.total_s)),)))
    return made
