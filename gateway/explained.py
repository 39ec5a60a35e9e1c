"""Routing's decisions, as clients are told of them."""

from __future__ import annotations

from gateway.costs import Option
from gateway.decisions import Decision, Refusal
from kvferry.api.inference.v1 import inference_pb2


def to_decision_proto(decision: Decision, now_s: float) -> inference_pb2.RouteDecision:
    """``now_s``: of the clock that the decision was made by."""
    route = decision.outcome
    proto = inference_pb2.RouteDecision(
        age_ms=int((now_s - decision.made_s) * 1000),
        view_age_ms=int(min(decision.view_age_s, now_s) * 1000),
        passed_over=[inference_pb2.PassedOver(worker_id=p.worker_id, why=p.why) for p in route.passed_over],
    )
    if isinstance(route, Refusal):
        proto.reason = route.reason
        return proto
    proto.policy = route.policy.value
    proto.reason = route.reason
    proto.num_prompt_tokens = route.demand.num_prompt_tokens
    proto.options.extend(
        _to_option_proto(option, option == route.chosen, route.demand.num_prompt_tokens) for option in route.options
    )
    return proto


def _to_option_proto(option: Option, chosen: bool, num_prompt_tokens: int) -> inference_pb2.RouteOption:
    decode, prefill, terms, pull = option.decode, option.prefill, option.terms, option.pull
    return inference_pb2.RouteOption(
        decode_worker=decode.key.worker_id,
        prefill_worker=prefill.key.worker_id if prefill else "",
        chosen=chosen,
        full=option.full,
        queue_s=terms.queue_s,
        prefill_s=terms.prefill_s,
        ship_s=terms.ship_s,
        stall_s=terms.stall_s,
        evict_s=terms.evict_s,
        decode_s=terms.decode_s,
        pull_worker=pull.holder.key.worker_id if pull else "",
        num_pulled_tokens=pull.num_blocks * (prefill or decode).block_size if pull else 0,
        pull_s=terms.pull_s,
        num_prefill_cached_tokens=min(num_prompt_tokens, prefill.num_prefix_blocks * prefill.block_size)
        if prefill
        else 0,
        num_decode_cached_tokens=min(num_prompt_tokens, decode.num_prefix_blocks * decode.block_size),
    )
