"""The one place where the client's values become protobuf and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import grpc
from google.protobuf.message import DecodeError

from kvferry import errors, types
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.inference.v1 import inference_pb2

_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: types.FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: types.FinishReason.LENGTH,
}
_ROLES = {
    common_pb2.WORKER_ROLE_PREFILL: types.WorkerRole.PREFILL,
    common_pb2.WORKER_ROLE_DECODE: types.WorkerRole.DECODE,
}
_PATH_KINDS: dict[int, str] = {
    directory_pb2.PATH_KIND_SHARED_MEMORY: "shared-memory",
    directory_pb2.PATH_KIND_TCP: "tcp",
    directory_pb2.PATH_KIND_RDMA: "rdma",
}
_HEALTH = {1: types.HealthStatus.SERVING, 2: types.HealthStatus.NOT_SERVING}

_US = 1e-6


def generate_request(
    prompt: str | Sequence[int] | inference_pb2.Chat,
    *,
    model: str,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: str | Sequence[str],
    stop_token_ids: Sequence[int],
    ignore_eos: bool,
    logprobs: int | None,
    speculate: bool | None,
    priority: int,
    request_id: str | None,
) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequestError for what protobuf cannot carry; ranges are the gateway's to judge."""
    try:
        request = inference_pb2.GenerateRequest(
            model=model,
            sampling=common_pb2.SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                num_logprobs=logprobs,
                speculate=speculate,
            ),
            stop=(stop,) if isinstance(stop, str) else stop,
            request_id=request_id or "",
            priority=priority,
        )
        if isinstance(prompt, str):
            request.text = prompt
        elif isinstance(prompt, inference_pb2.Chat):
            request.chat.CopyFrom(prompt)
        elif isinstance(prompt, (bytes, bytearray)):
            raise errors.InvalidRequestError("prompt must be text or token ids, not bytes")
        else:
            request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=prompt))
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequestError(f"the request cannot be sent: {error}") from error
    return request


def chat(messages: Sequence[types.Message]) -> inference_pb2.Chat:
    converted = []
    for index, message in enumerate(messages):
        if isinstance(message, Mapping):
            if set(message) != {"role", "content"}:
                raise errors.InvalidRequestError(f"messages[{index}] must have role and content, and nothing else")
            role, content = message["role"], message["content"]
        elif isinstance(message, types.ChatMessage):
            role, content = message.role, message.content
        else:
            raise errors.InvalidRequestError(f"messages[{index}] is neither a ChatMessage nor a mapping")
        try:
            converted.append(inference_pb2.ChatMessage(role=role, content=content))
        except (TypeError, ValueError) as error:
            raise errors.InvalidRequestError(f"messages[{index}] cannot be sent: {error}") from error
    return inference_pb2.Chat(messages=converted)


def tokenize_request(prompt: str | Sequence[types.Message], model: str) -> inference_pb2.TokenizeRequest:
    try:
        if isinstance(prompt, str):
            return inference_pb2.TokenizeRequest(model=model, text=prompt)
        return inference_pb2.TokenizeRequest(model=model, chat=chat(prompt))
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequestError(f"the text cannot be sent: {error}") from error


def detokenize_request(ids: Sequence[int], model: str) -> inference_pb2.DetokenizeRequest:
    try:
        return inference_pb2.DetokenizeRequest(model=model, ids=ids)
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequestError(f"the ids cannot be sent: {error}") from error


def chunk(message: inference_pb2.Chunk) -> types.Chunk:
    return types.Chunk(text=message.text, tokens=tuple(map(_token, message.tokens)))


def finish_reason(value: common_pb2.FinishReason.ValueType) -> types.FinishReason:
    return _FINISH_REASONS.get(value, types.FinishReason.UNKNOWN)


def usage(message: inference_pb2.Usage) -> types.Usage:
    return types.Usage(
        num_prompt_tokens=message.num_prompt_tokens,
        num_output_tokens=message.num_output_tokens,
        num_cached_tokens=message.num_cached_tokens,
    )


def timeline(message: inference_pb2.Timeline) -> types.Timeline:
    return types.Timeline(
        tokenize_s=message.tokenize_us * _US,
        route_s=message.route_us * _US,
        ttft_s=message.ttft_us * _US,
        total_s=message.total_us * _US,
        itl_p50_s=message.itl_p50_us * _US,
        itl_p99_s=message.itl_p99_us * _US,
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        prefill=_prefill(message.prefill) if message.HasField("prefill") else None,
        transfer=_transfer(message.transfer) if message.HasField("transfer") else None,
        decode=_decode(message.decode) if message.HasField("decode") else None,
        num_retries=message.num_retries,
        route_reason=message.route_reason,
        opened_s=message.opened_us * _US,
        line_s=message.line_us * _US,
        ticket_s=message.ticket_us * _US if message.HasField("ticket_us") else None,
    )


def model(message: common_pb2.ModelInfo) -> types.ModelInfo:
    return types.ModelInfo(
        name=message.name,
        revision=message.revision,
        context_length=message.context_length,
        vocab_size=message.vocab_size,
    )


def cluster(message: inference_pb2.DescribeClusterResponse) -> types.Cluster:
    return types.Cluster(
        model=model(message.model),
        workers=tuple(map(_worker, message.workers)),
        view_age_s=message.view_age_ms / 1000,
        num_requests_in_flight=message.num_requests_in_flight,
        num_requests_total=message.num_requests_total,
        version=message.version,
    )


def traffic(message: inference_pb2.DescribeTrafficResponse) -> types.Traffic:
    columns = (
        message.age_us, message.num_prompt_tokens, message.num_cached_tokens, message.num_output_tokens,
        message.ttft_us, message.itl_p99_us, message.tpot_us, message.total_us,
    )  # fmt: skip
    served = [
        types.ServedRequest(
            age / 1e6, prompt, cached, output, ttft / 1e6, itl / 1e6 if itl else None, tpot / 1e6 if tpot else None,
            total / 1e6,
        )
        for age, prompt, cached, output, ttft, itl, tpot, total in zip(*columns, strict=True)
    ]  # fmt: skip
    served.sort(key=lambda each: -each.age_s)
    return types.Traffic(model(message.model), message.since_ms / 1000, tuple(served))


def route_decision(message: inference_pb2.RouteDecision) -> types.RouteDecision:
    return types.RouteDecision(
        policy=message.policy,
        reason=message.reason,
        num_prompt_tokens=message.num_prompt_tokens,
        age_s=message.age_ms / 1000,
        view_age_s=message.view_age_ms / 1000,
        options=tuple(map(_route_option, message.options)),
        passed_over={passed.worker_id: passed.why for passed in message.passed_over},
    )


def _route_option(message: inference_pb2.RouteOption) -> types.RouteOption:
    terms = (message.queue_s, message.pull_s, message.prefill_s, message.ship_s, message.stall_s, message.evict_s,
             message.decode_s)  # fmt: skip
    return types.RouteOption(
        decode_worker=message.decode_worker,
        prefill_worker=message.prefill_worker,
        chosen=message.chosen,
        full=message.full,
        queue_s=message.queue_s,
        prefill_s=message.prefill_s,
        ship_s=message.ship_s,
        stall_s=message.stall_s,
        decode_s=message.decode_s,
        total_s=sum(terms),
        num_prefill_cached_tokens=message.num_prefill_cached_tokens,
        num_decode_cached_tokens=message.num_decode_cached_tokens,
        pull_worker=message.pull_worker,
        num_pulled_tokens=message.num_pulled_tokens,
        pull_s=message.pull_s,
        evict_s=message.evict_s,
    )


def health(reply: bytes) -> types.HealthStatus:
    """Reads a grpc.health.v1.HealthCheckResponse, whose only field is number 1, an enum."""
    status = 0
    if reply:
        if reply[0] != 0x08 or len(reply) != 2:
            raise errors.InternalError("the health service sent something else than a HealthCheckResponse")
        status = reply[1]
    return _HEALTH.get(status, types.HealthStatus.UNKNOWN)


def error(rpc_error: grpc.RpcError, *, cancelled: bool = False) -> errors.Error:
    """The typed error for a failed call, made by either client.  Unless it was ``cancelled`` here, CANCELLED is how gRPC
    tells of calls that came while the gateway was shutting down."""
    try:
        failure = errors.from_rpc_error(rpc_error)
    except DecodeError:
        return errors.InternalError("the server sent error details that cannot be read")
    if isinstance(failure, errors.CancelledError) and not cancelled:
        return errors.UnavailableError("the gateway ended the call; it is shutting down, or has been restarted")
    return failure


def _token(message: common_pb2.Token) -> types.Token:
    return types.Token(
        index=message.index,
        id=message.id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_logprobs=tuple(types.TokenLogprob(top.token_id, top.logprob) for top in message.top_logprobs),
    )


def _prefill(message: common_pb2.PrefillStats) -> types.PrefillStats:
    return types.PrefillStats(
        queue_s=message.queue_us * _US,
        compute_s=message.compute_us * _US,
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_chunks=message.num_chunks,
        pull=_pull(message.pull) if message.HasField("pull") else None,
    )


def _pull(message: common_pb2.PullStats) -> types.PullStats:
    return types.PullStats(
        holder=message.holder,
        outcome=message.outcome,
        num_blocks=message.num_blocks,
        num_bytes=message.num_bytes,
        elapsed_s=message.elapsed_us * _US,
        busy_s=message.busy_us * _US,
    )


def _transfer(message: common_pb2.TransferStats) -> types.TransferStats:
    return types.TransferStats(
        num_blocks=message.num_blocks,
        num_bytes=message.num_bytes,
        busy_s=message.busy_us * _US,
        exposed_s=message.exposed_us * _US,
        path=message.path,
        verify_s=message.verify_us * _US,
        num_hidden_bytes=message.num_hidden_bytes,
        chunks=tuple(map(_chunk_times, message.chunks)),
    )


def _chunk_times(message: common_pb2.ChunkTimes) -> types.ChunkTimes:
    written = message.num_blocks > 0
    return types.ChunkTimes(
        compute_begin_s=message.compute_begin_us * _US,
        compute_end_s=message.compute_end_us * _US,
        num_blocks=message.num_blocks,
        write_begin_s=message.write_begin_us * _US if written else None,
        write_end_s=message.write_end_us * _US if written else None,
    )


def _decode(message: common_pb2.DecodeStats) -> types.DecodeStats:
    return types.DecodeStats(
        wait_for_kv_s=message.wait_for_kv_us * _US,
        compute_s=message.compute_us * _US,
        num_steps=message.num_steps,
        num_cached_tokens=message.num_cached_tokens,
        prefilled_locally=message.prefilled_locally,
        num_preemptions=message.num_preemptions,
        first_step_s=message.first_step_us * _US if message.HasField("first_step_us") else None,
        num_drafted_tokens=message.num_drafted_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
    )


def _worker(message: directory_pb2.WorkerState) -> types.Worker:
    info, load = message.info, message.load
    return types.Worker(
        worker_id=info.worker_id,
        incarnation=info.incarnation,
        role=_ROLES.get(info.role, types.WorkerRole.UNKNOWN),
        control_address=info.control_address,
        version=info.version,
        model=model(info.model),
        layout=types.Layout(
            fingerprint=info.layout.fingerprint,
            block_size_tokens=info.layout.block_size_tokens,
            block_nbytes=info.layout.block_nbytes,
            dtype=info.layout.dtype,
        ),
        blocks=types.BlockCounts(
            total=load.blocks.total,
            free=load.blocks.free,
            active=load.blocks.active,
            cached=load.blocks.cached,
            lent=load.blocks.lent,
            quarantined=load.blocks.quarantined,
        ),
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_queued_prefill_tokens=load.num_queued_prefill_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_tokens_per_s=load.decode_tokens_per_s,
        draining=load.draining,
        num_pins=load.num_pins,
        num_pinned_blocks=load.num_pinned_blocks,
        num_host_blocks=load.num_host_blocks,
        num_host_slots=load.num_host_slots,
        phases=_phases(load.phases) if load.phases else None,
        oldest_protocol=info.oldest_protocol or info.newest_protocol or 1,
        newest_protocol=info.newest_protocol or 1,
        paths=tuple(types.TransportPath(_PATH_KINDS.get(path.kind, "unknown"), path.scope) for path in info.paths),
        labels=dict(info.labels),
        step_sums=_step_sums(load.step_sums) if load.HasField("step_sums") else None,
        transfer_bytes_per_s=load.transfer_bytes_per_s,
        transfer_round_trip_s=load.transfer_round_trip_s,
    )


def _step_sums(message: directory_pb2.StepSums) -> types.StepSums:
    shares = tuple(message.shares)
    squares = message.squares or (shares[0] if shares else 0.0)
    return types.StepSums(
        message.seconds, shares, tuple(message.ratios), tuple(message.products), tuple(message.scatter), squares
    )


def _phases(messages: Iterable[directory_pb2.PhaseLoad]) -> types.Phases:
    by_phase = {message.phase: message for message in messages}
    prefill, decode, transfer, idle = (
        _phase_use(by_phase.get(phase, directory_pb2.PhaseLoad()))
        for phase in (
            directory_pb2.PHASE_PREFILL, directory_pb2.PHASE_DECODE, directory_pb2.PHASE_TRANSFER, directory_pb2.PHASE_IDLE
        )
    )  # fmt: skip
    return types.Phases(prefill, decode, transfer, idle)


def _phase_use(message: directory_pb2.PhaseLoad) -> types.PhaseUse:
    return types.PhaseUse(
        share=message.share,
        seconds=message.seconds,
        flops=message.flops,
        nbytes=message.bytes,
        intensity=message.intensity,
        mfu=message.mfu,
        mbu=message.mbu,
    )
