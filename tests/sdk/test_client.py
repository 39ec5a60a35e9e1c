"""The blocking client against a real server that plays scripts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

import kvferry
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from tests.sdk.fake_gateway import FakeGateway, answer, chunk, finished, refuse, started
from tests.sdk.far_away import FarAway


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway(answer("Hel", "lo", "!")) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[kvferry.Client]:
    with kvferry.Client(gateway.address) as client:
        yield client


def test_stream_yields_chunks_in_order_and_knows_the_rest_afterwards(client: kvferry.Client) -> None:
    with client.generate("Say hello") as stream:
        first = next(stream)
        assert first == kvferry.Chunk("Hel", (kvferry.Token(index=0, id=100),))
        assert (stream.text, stream.request_id, stream.seed, stream.num_prompt_tokens) == ("Hel", "req-1", 7, 40)
        assert stream.finish_reason is None
        assert [c.text for c in stream] == ["lo", "!"]
    assert stream.text == "Hello!"
    assert stream.finish_reason is kvferry.FinishReason.STOP
    assert stream.usage == kvferry.Usage(num_prompt_tokens=40, num_output_tokens=3, num_cached_tokens=16)
    assert list(stream) == []


def test_result_returns_the_whole_answer_with_its_timeline(client: kvferry.Client) -> None:
    completion = client.generate("Say hello").result()
    assert completion.text == "Hello!"
    assert completion.token_ids == (100, 101, 102)
    assert completion.logprobs is None
    assert (completion.model, completion.seed) == ("tiny", 7)
    timeline = completion.timeline
    assert timeline.ttft_s == pytest.approx(0.08)
    assert timeline.prefill is not None
    assert timeline.prefill.compute_s == pytest.approx(0.07)
    assert timeline.transfer is not None
    assert timeline.transfer.bytes_per_s == pytest.approx(3e9)
    assert timeline.decode is not None
    assert not timeline.decode.prefilled_locally


def test_every_parameter_reaches_the_server(client: kvferry.Client, gateway: FakeGateway) -> None:
    client.generate(
        [1, 2, 3],
        model="tiny",
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=4,
        seed=2**64 - 1,
        stop="end",
        stop_token_ids=[9],
        ignore_eos=True,
        logprobs=0,
        speculate=False,
        priority=-3,
        request_id="mine",
    ).result()
    assert gateway.requests == [
        inference_pb2.GenerateRequest(
            model="tiny",
            token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]),
            sampling=common_pb2.SamplingParams(
                max_tokens=5,
                temperature=0.5,
                top_p=0.25,
                top_k=4,
                seed=2**64 - 1,
                stop_token_ids=[9],
                ignore_eos=True,
                num_logprobs=0,
                speculate=False,
            ),
            stop=["end"],
            request_id="mine",
            priority=-3,
        )
    ]


def test_parameters_left_out_are_unset_on_the_wire(client: kvferry.Client, gateway: FakeGateway) -> None:
    client.generate("x").result()
    assert gateway.requests == [inference_pb2.GenerateRequest(text="x", sampling=common_pb2.SamplingParams())]


def test_chat_takes_messages_and_mappings(client: kvferry.Client, gateway: FakeGateway) -> None:
    client.chat([kvferry.ChatMessage("system", "Be brief."), {"role": "user", "content": "Hi"}], max_tokens=3).result()
    (request,) = gateway.requests
    assert isinstance(request, inference_pb2.GenerateRequest)
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert request.sampling.max_tokens == 3


def test_logprobs_arrive(gateway: FakeGateway, client: kvferry.Client) -> None:
    def script(
        request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        top = [common_pb2.TokenLogprob(token_id=5, logprob=-0.5), common_pb2.TokenLogprob(token_id=6, logprob=-2.0)]
        yield started()
        yield chunk("a", common_pb2.Token(index=0, id=5, logprob=-0.5, top_logprobs=top))
        yield finished(common_pb2.FINISH_REASON_LENGTH)

    gateway.scripts = [script]
    completion = client.generate("x", logprobs=2).result()
    assert completion.logprobs == (-0.5,)
    assert completion.tokens[0].top_logprobs == (kvferry.TokenLogprob(5, -0.5), kvferry.TokenLogprob(6, -2.0))
    assert completion.finish_reason is kvferry.FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "stop", "words"),
    [
        ([-1], (), "-1"),
        (b"bytes", (), "bytes"),
        ("\ud800", (), "surrogates"),
        ("x", (3,), "cannot be sent"),
        ([1.5], (), "cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(
    client: kvferry.Client, gateway: FakeGateway, prompt: str, stop: tuple[str, ...], words: str
) -> None:
    with pytest.raises(kvferry.InvalidRequestError, match=words):
        client.generate(prompt, stop=stop)
    assert gateway.requests == []


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"role": "user", "content": "x", "name": "y"}], ["hello"]])
def test_malformed_messages_are_refused_at_once(client: kvferry.Client, messages: list[dict[str, str]]) -> None:
    with pytest.raises(kvferry.InvalidRequestError, match=r"messages\[0\]"):
        client.chat(messages)


@pytest.mark.parametrize(
    "error",
    [
        kvferry.InvalidRequestError(
            "max_tokens must be > 0", reason="BAD_MAX_TOKENS", metadata={"field": "max_tokens"}
        ),
        kvferry.NotFoundError("no model named x"),
        kvferry.UnauthenticatedError("who are you"),
        kvferry.PermissionDeniedError("not for you"),
        kvferry.ConflictError("wrong state"),
        kvferry.AbortedError("half-way"),
        kvferry.InternalError("a bug"),
    ],
)
def test_errors_keep_their_type_and_details(gateway: FakeGateway, client: kvferry.Client, error: kvferry.Error) -> None:
    gateway.scripts = [refuse(error)]
    stream = client.generate("x")
    with pytest.raises(type(error)) as caught:
        stream.result()
    assert type(caught.value) is type(error)
    assert caught.value.message == error.message
    assert caught.value.reason == error.reason
    assert caught.value.metadata == error.metadata
    assert len(gateway.requests) == 1, "these are not for trying again"
    with pytest.raises(type(error)):
        next(stream)  # and stay


def test_unavailable_first_then_fine(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [refuse(kvferry.UnavailableError("no decode worker")), *gateway.scripts]
    assert client.generate("x").result().text == "Hello!"
    assert len(gateway.requests) == 2


def test_a_call_that_a_gateway_cancels_because_it_shuts_down_is_made_again(
    gateway: FakeGateway, client: kvferry.Client
) -> None:
    gateway.scripts = [refuse(kvferry.CancelledError("CANCELLED")), *gateway.scripts]
    assert client.generate("x").result().text == "Hello!"
    gateway.failures = [kvferry.CancelledError("CANCELLED")]
    assert client.models()


def test_attempts_are_bounded(gateway: FakeGateway) -> None:
    gateway.scripts = [refuse(kvferry.UnavailableError("no decode worker"))]
    with (
        kvferry.Client(gateway.address, max_attempts=2) as client,
        pytest.raises(kvferry.UnavailableError, match="no decode worker"),
    ):
        client.generate("x").result()
    assert len(gateway.requests) == 2


def test_a_gateway_that_refuses_or_is_away_is_left_for_the_next(gateway: FakeGateway) -> None:
    with FakeGateway(answer("other")) as other:
        gateway.scripts = [refuse(kvferry.OverloadedError("shutting down", retry_after_s=0.01))]
        with kvferry.Client(f"{gateway.address}, {other.address}") as client:
            assert client.generate("x").result().text == "other"
            assert client.generate("x").result().text == "other"
            assert (len(gateway.requests), len(other.requests)) == (1, 2)
            gateway.scripts = [answer("back")]
            other.failures = [kvferry.UnavailableError("starting")]
            assert client.models()
            assert client.generate("x").result().text == "back"
        with kvferry.Client(f"127.0.0.1:1,{other.address}", max_attempts=2) as client:
            assert client.generate("x").result().text == "other"


def test_a_gateway_far_away_is_given_the_time_to_answer(gateway: FakeGateway) -> None:
    with FarAway(gateway.address, delay_s=0.6) as far, kvferry.Client(far.address, max_attempts=1) as client:
        assert client.generate("Say hello").result().text == "Hello!"


def test_calls_that_fail_together_do_not_pass_the_next_gateway_by(gateway: FakeGateway) -> None:
    with FakeGateway(answer("other")) as other, kvferry.Client(f"{gateway.address},{other.address}") as client:
        gateway.scripts = [refuse(kvferry.UnavailableError("no decode worker"))]
        streams = [client.generate("x"), client.generate("y")]
        assert [stream.result().text for stream in streams] == ["other", "other"]


def test_a_gateway_that_comes_back_after_long_is_found_by_the_next_call() -> None:
    """Just when the client has looked for it in vain once more, and waits for longest before it looks again."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        client = kvferry.Client(f"127.0.0.1:{port}")
        nobody = client.generate("x", timeout=10)
        door.settimeout(5)
        until = time.monotonic() + 4
        while time.monotonic() < until:
            door.accept()[0].close()
    with pytest.raises(kvferry.UnavailableError):
        nobody.result()
    with FakeGateway(answer("back"), port=port), client:
        assert client.generate("x").result().text == "back"


def test_an_address_without_a_part_is_refused() -> None:
    with pytest.raises(kvferry.InvalidRequestError, match="comma"):
        kvferry.Client("127.0.0.1:8470,")


def test_overload_with_a_hint_waits_that_long(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [refuse(kvferry.OverloadedError("busy", retry_after_s=0.3)), *gateway.scripts]
    began = time.monotonic()
    assert client.generate("x").result().text == "Hello!"
    assert time.monotonic() - began >= 0.3


def test_overload_without_a_hint_is_final(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [refuse(kvferry.OverloadedError("busy")), *gateway.scripts]
    with pytest.raises(kvferry.OverloadedError, match="busy"):
        client.generate("x").result()
    assert len(gateway.requests) == 1


def test_a_hint_beyond_the_deadline_gives_the_refusal_at_once(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [refuse(kvferry.OverloadedError("busy", retry_after_s=60))]
    began = time.monotonic()
    with pytest.raises(kvferry.OverloadedError) as caught:
        client.generate("x", timeout=5).result()
    assert caught.value.retry_after_s == 60
    assert time.monotonic() - began < 4


def test_nothing_is_retried_once_something_has_arrived(gateway: FakeGateway, client: kvferry.Client) -> None:
    def breaks(
        request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        yield started()
        yield from refuse(kvferry.UnavailableError("the worker was lost"))(request, context)

    gateway.scripts = [breaks, *gateway.scripts]
    with pytest.raises(kvferry.UnavailableError, match="lost"):
        client.generate("x").result()
    assert len(gateway.requests) == 1


def test_a_stream_without_its_end_is_an_error(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [lambda request, context: iter([started(), chunk("Hel")])]
    stream = client.generate("x")
    assert next(stream).text == "Hel"
    with pytest.raises(kvferry.InternalError, match="broke off"):
        next(stream)


def test_leaving_the_block_cancels_the_call(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [gateway.hold]
    with client.generate("x") as stream:
        assert next(stream).text == "one"
        assert not gateway.cancelled.is_set()
    assert gateway.cancelled.wait(10)
    with pytest.raises(kvferry.CancelledError):
        next(stream)


def test_dropping_the_stream_cancels_the_call(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [gateway.hold]
    next(client.generate("x"))
    assert gateway.cancelled.wait(10)


@pytest.mark.parametrize("script", ["hold", "hang"])
def test_another_thread_may_close(gateway: FakeGateway, client: kvferry.Client, script: str) -> None:
    gateway.scripts = [getattr(gateway, script)]
    stream = client.generate("x")
    timer = threading.Timer(0.1, stream.close)
    timer.start()
    with pytest.raises(kvferry.CancelledError):
        stream.result()
    timer.join()
    assert gateway.cancelled.wait(10)


def test_close_interrupts_the_wait_before_a_retry(gateway: FakeGateway, client: kvferry.Client) -> None:
    gateway.scripts = [refuse(kvferry.OverloadedError("busy", retry_after_s=30))]
    stream = client.generate("x")
    timer = threading.Timer(0.2, stream.close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(kvferry.CancelledError):
        stream.result()
    timer.join()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("script", ["hold", "hang"])
def test_the_deadline_ends_a_stream(gateway: FakeGateway, client: kvferry.Client, script: str) -> None:
    gateway.scripts = [getattr(gateway, script)]
    began = time.monotonic()
    with pytest.raises(kvferry.DeadlineError):
        client.generate("x", timeout=0.3).result()
    assert 0.25 < time.monotonic() - began < 10
    assert gateway.cancelled.wait(10)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_timeouts_must_be_positive_and_finite(client: kvferry.Client, timeout: float) -> None:
    with pytest.raises(kvferry.InvalidRequestError, match="timeout"):
        client.generate("x", timeout=timeout)


def test_unary_calls(client: kvferry.Client, gateway: FakeGateway) -> None:
    assert client.models() == (kvferry.ModelInfo("tiny", "r1", context_length=2048, vocab_size=49152),)
    assert client.tokenize("some text") == (5, 6, 7)
    assert client.tokenize([kvferry.ChatMessage("user", "Hi")], model="tiny") == (5, 6, 7)
    assert client.detokenize([1, 2]) == "12"
    text, conversation = gateway.requests[1:3]
    assert text == inference_pb2.TokenizeRequest(text="some text")
    assert isinstance(conversation, inference_pb2.TokenizeRequest)
    assert conversation.chat.messages[0].content == "Hi"


def test_cluster_is_described_in_full(client: kvferry.Client) -> None:
    cluster = client.cluster()
    assert (cluster.view_age_s, cluster.num_requests_in_flight, cluster.num_requests_total) == (0.25, 2, 41)
    prefill, decode = cluster.workers
    assert (prefill.role, decode.role) == (kvferry.WorkerRole.PREFILL, kvferry.WorkerRole.DECODE)
    assert prefill.blocks == kvferry.BlockCounts(total=100, free=60, active=20, cached=15, lent=4, quarantined=1)
    assert prefill.layout == kvferry.Layout("f", block_size_tokens=16, block_nbytes=1_474_560, dtype="float32")
    assert (prefill.prefill_tokens_per_s, prefill.decode_tokens_per_s) == (812.5, 48.25)
    assert (prefill.draining, decode.draining) == (False, True)
    assert (prefill.num_pins, prefill.num_pinned_blocks) == (2, 7)
    assert (prefill.num_host_blocks, prefill.num_host_slots) == (321, 400)
    assert (prefill.oldest_protocol, prefill.newest_protocol) == (2, 3)
    assert prefill.paths == (kvferry.TransportPath("shared-memory", "here"),)
    assert prefill.labels == {"zone": "a"}


def test_unary_calls_are_retried_when_unavailable_only(client: kvferry.Client, gateway: FakeGateway) -> None:
    gateway.failures = [kvferry.UnavailableError("starting"), kvferry.UnavailableError("starting")]
    assert client.tokenize("x") == (5, 6, 7)
    assert len(gateway.requests) == 3
    gateway.failures = [kvferry.OverloadedError("busy", retry_after_s=0.01)]
    with pytest.raises(kvferry.OverloadedError):
        client.tokenize("x")
    assert len(gateway.requests) == 4


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (b"\x08\x01", kvferry.HealthStatus.SERVING),
        (b"\x08\x02", kvferry.HealthStatus.NOT_SERVING),
        (b"", kvferry.HealthStatus.UNKNOWN),
    ],
)
def test_health(client: kvferry.Client, gateway: FakeGateway, reply: bytes, status: kvferry.HealthStatus) -> None:
    gateway.serving = reply
    assert client.health() is status


def test_nobody_there_is_unavailable_within_the_deadline() -> None:
    with FakeGateway() as gone:
        address = gone.address
    with kvferry.Client(address, timeout=1) as client:
        began = time.monotonic()
        with pytest.raises(kvferry.UnavailableError):
            client.models()
        with pytest.raises(kvferry.UnavailableError):
            client.health()
        assert time.monotonic() - began < 5


def test_a_closed_client_says_so(gateway: FakeGateway) -> None:
    client = kvferry.Client(gateway.address)
    client.close()
    client.close()
    for call in (client.models, client.cluster, client.health, lambda: client.generate("x")):
        with pytest.raises(kvferry.ConflictError, match="closed"):
            call()


def test_api_key_goes_with_every_call(gateway: FakeGateway) -> None:
    with kvferry.Client(gateway.address, api_key="s3cret") as client:
        client.models()
        client.generate("x").result()
    assert [m.get("authorization") for m in gateway.metadata] == ["Bearer s3cret"] * 2
    with pytest.raises(kvferry.InvalidRequestError, match="api_key"):
        kvferry.Client(gateway.address, api_key="line\nbreak")


def test_the_server_learns_the_clients_version(client: kvferry.Client, gateway: FakeGateway) -> None:
    client.models()
    assert gateway.metadata[0]["user-agent"].startswith(f"kvferry/{kvferry.__version__} ")


def test_a_route_is_explained_in_full(client: kvferry.Client, gateway: FakeGateway) -> None:
    first, second = client.explain_route("r-1")
    assert (first.policy, first.age_s, first.view_age_s) == ("kv-aware", 4.2, 0.3)
    assert [option.chosen for option in first.options] == [True, False]
    assert first.options[1].full
    assert first.options[0].total_s == 2.3125
    assert (first.options[0].pull_worker, first.options[0].pull_s) == ("decode-0", 0.035)
    assert first.options[0].evict_s == 0.015
    assert first.passed_over == {"decode-2": "draining"}
    assert (second.policy, second.options) == ("", ())


def test_traffic_is_told_in_order_of_arrival(client: kvferry.Client) -> None:
    traffic = client.traffic()
    assert (traffic.model.name, traffic.since_s) == ("meta-llama/Llama-3.1-8B-Instruct", 70.0)
    ages = [served.age_s for served in traffic.served]
    assert ages == sorted(ages, reverse=True)
    assert traffic.served[0] == kvferry.ServedRequest(80.0, 9999, 0, 1, 9.0, None, None, 9.0)
    assert traffic.served[-1].tpot_s == 0.02
