"""Prefill and decode workers whose blocks differ in size or type: the same answers, or KV that is rounded exactly as torch
rounds it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest
import torch

from kvferry import AsyncClient, Client, Completion
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from services.engine.hashing import chain_root, extend_chain
from services.engine.layout import KvLayout
from services.engine.model_files import ModelFiles
from services.engine.weights import DTYPES
from tests.integration.conftest import Running, started
from tests.integration.reference import Reference
from tests.integration.test_transfer import PROMPT, Handmade
from transport import Op, create

NUM_TOKENS = 24
PROMPTS = [
    "The",
    "The capital of France is Paris. The capital of Italy is",
    "def fibonacci(n):\n    ",
    " ".join(str(i * i) for i in range(40)),
    "It was a bright cold day in April, and the clocks were striking thirteen. " * 5,
    "Prefill is limited by compute, decode by memory bandwidth; so they want different machines. " * 12,
]


async def ask_all(address: str) -> list[tuple[tuple[int, ...], Completion]]:
    """Each prompt's tokens and answer, all asked at once."""
    options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    async with AsyncClient(address) as client:
        prompts = [await client.tokenize(prompt) for prompt in PROMPTS]
        answers = await asyncio.gather(*(client.generate(prompt, **options).result() for prompt in PROMPTS))
    for answer in answers:
        assert (answer.timeline.prefill_worker, answer.timeline.num_retries) == ("prefill-0", 0)
        assert len(answer.token_ids) == NUM_TOKENS
    return list(zip(prompts, answers, strict=True))


@pytest.fixture(scope="module", params=[(16, 32), (32, 16)], ids=["16 to 32", "32 to 16"])
def unequal_sizes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    prefill, decode = request.param
    logs = tmp_path_factory.mktemp("logs")
    with started(logs, prefill_block_size=prefill, decode_block_size=decode) as running:
        running.wait_routable()
        yield running
        running.assert_settles(10.0)


def test_unequal_block_sizes_give_the_tokens_of_transformers(unequal_sizes: Running, greedy: Reference) -> None:
    before = unequal_sizes.stats("prefill-0"), unequal_sizes.stats("decode-0")
    answers = asyncio.run(ask_all(unequal_sizes.address))
    for prompt, answer in answers:
        assert greedy.continuation_is_greedy(prompt, answer.token_ids)
    num_shipped = sum(len(prompt) for prompt, _ in answers)
    after = unequal_sizes.stats("prefill-0"), unequal_sizes.stats("decode-0")
    written = after[0].num_bytes_written - before[0].num_bytes_written
    received = after[1].num_bytes_received - before[1].num_bytes_received
    assert written == received == num_shipped * 30 * 2 * 3 * 64 * 4, "the prompts' tokens, and nothing besides"
    blocks = [a.num_blocks_written + a.num_blocks_received - b.num_blocks_written - b.num_blocks_received
              for a, b in zip(after, before, strict=True)]  # fmt: skip
    assert blocks[0] == blocks[1] > 0
    assert after[1].num_prefill_tokens == before[1].num_prefill_tokens, "the decode worker computed no prompt"


def test_prefix_hits_that_end_in_different_places(unequal_sizes: Running, greedy: Reference) -> None:
    """Prompts that grow: each finds a part of itself on both sides, in full blocks of each side's own size."""
    with Client(unequal_sizes.address) as client:
        text = "A prompt that grows from one request to the next, and never twice by the same number of words. " * 2
        num_cached = []
        for round_ in range(4):
            text += "So it goes on, word after word. " * (round_ + 1)
            answer = client.generate(text, max_tokens=8, temperature=0, ignore_eos=True).result()
            assert answer.timeline.prefill_worker == "prefill-0"
            assert greedy.continuation_is_greedy(client.tokenize(text), answer.token_ids)
            num_cached.append(answer.usage.num_cached_tokens)
    assert num_cached[0] == 0
    assert all(num_cached[1:])


DTYPES_TESTED = [("float32", "bfloat16", 16), ("bfloat16", "float16", 32)]


@pytest.fixture(scope="module", params=DTYPES_TESTED, ids=["float32 to bfloat16", "bfloat16 to float16"])
def unequal_dtypes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    prefill, decode, block_size = request.param
    logs = tmp_path_factory.mktemp("logs")
    with started(logs, prefill_dtype=prefill, decode_dtype=decode, decode_block_size=block_size) as running:
        running.wait_routable()
        yield running
        running.assert_settles(10.0)


def kv_of(pool: bytearray, layout: KvLayout) -> torch.Tensor:
    """[token, layer, key or value, head, dim] of blocks that lie back to back."""
    blocks = torch.frombuffer(pool, dtype=DTYPES[layout.dtype]).view(-1, *layout.block_shape)
    return blocks.movedim(3, 1).flatten(0, 1)


def read_kv(descriptor: bytes, blocks: Sequence[int], layout: KvLayout) -> torch.Tensor:
    """Read from the pool of the worker that has the blocks."""
    nbytes = layout.block_nbytes
    with create("ucx") as transport, transport.allocate(len(blocks) * nbytes) as region:
        with transport.open(descriptor) as remote:
            here, there = [i * nbytes for i in range(len(blocks))], [block * nbytes for block in blocks]
            transport.post(Op.READ, region, remote, here, there, nbytes).wait(10)
        return kv_of(bytearray(region.view), layout)


def cached_kv(cluster: Running, prompt: Sequence[int], salt: bytes, layout: KvLayout) -> torch.Tensor:
    """What the prefill worker has of a prompt in its cache: all but the tokens of a last block that is not full."""
    info = cluster.info("prefill-0")
    hashes = extend_chain(chain_root(layout.model_revision, salt), prompt, layout.block_size)
    with grpc.insecure_channel(cluster.local.address("prefill-0")) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        me: dict[str, Any] = {
            "reader_id": "test", "reader_incarnation": 1, "owner_incarnation": info.incarnation
        }  # fmt: skip
        pinned = stub.PinBlocks(worker_pb2.PinBlocksRequest(hashes=b"".join(hashes), **me), timeout=10)
        assert len(pinned.blocks) == len(prompt) // layout.block_size > 1
        found = read_kv(pinned.region, pinned.blocks, layout)
        assert stub.ReleasePin(worker_pb2.ReleasePinRequest(pin_id=pinned.pin_id, **me), timeout=10).held
    return found


async def test_the_kv_that_arrives_is_the_writers_rounded_by_torch(
    unequal_dtypes: Running, smollm2: ModelFiles
) -> None:
    with Client(unequal_dtypes.address) as client:
        prompt = list(client.tokenize("Rounded to the nearest. " + PROMPT * 2))
    model = smollm2.config
    told = unequal_dtypes.info("prefill-0").layout, unequal_dtypes.info("decode-0").layout
    ours, theirs = (
        KvLayout(
            model.revision, layout.dtype, layout.block_size_tokens, model.num_layers, model.num_kv_heads, model.head_dim
        )
        for layout in told
    )
    assert [layout.fingerprint for layout in told] == [ours.fingerprint, theirs.fingerprint]
    assert ours.fingerprint != theirs.fingerprint
    assert {layout.content_fingerprint for layout in told} == {ours.content_fingerprint}
    found: list[torch.Tensor] = []
    tokens = await Handmade(unequal_dtypes, prompt, b"rounded").tokens(
        lambda ticket: found.append(read_kv(ticket.region, ticket.blocks, theirs))
    )
    assert len(tokens) == 24
    written = await asyncio.to_thread(cached_kv, unequal_dtypes, prompt, b"rounded", ours)
    assert len(prompt) - ours.block_size < len(written) <= len(prompt)
    assert torch.equal(found[0][: len(written)], written.to(DTYPES[theirs.dtype]))
    assert found[0][len(written) : len(prompt)].flatten(1).any(1).all(), "the rest has come as well"
    await asyncio.to_thread(unequal_dtypes.assert_settles)


# How far behind the likeliest token, in float32 logits, a token may be that bfloat16 or float16 takes for the likeliest.
LOGIT_TOLERANCE = 0.5


def test_unequal_types_answer_within_their_precision(unequal_dtypes: Running, reference: Any) -> None:
    for prompt, answer in asyncio.run(ask_all(unequal_dtypes.address)):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *answer.token_ids[:-1]]])).logits[0, -NUM_TOKENS:]
        behind = logits.max(-1).values - logits[torch.arange(NUM_TOKENS), torch.tensor(answer.token_ids)]
        assert behind.max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("change", [{"model_revision": "another"}, {"num_kv_heads": 9}, {"num_layers": 29}])
async def test_other_content_is_refused_with_both_layouts_named(
    unequal_dtypes: Running, smollm2: ModelFiles, change: dict[str, Any]
) -> None:
    model, info = smollm2.config, unequal_dtypes.info("prefill-0")
    form = {"dtype": "bfloat16", "block_size": 16, "num_layers": model.num_layers, "head_dim": model.head_dim}
    content = {"model_revision": model.revision, "num_kv_heads": model.num_kv_heads}
    other = KvLayout(**{**form, **content, **change})
    layout = common_pb2.Layout(
        fingerprint=other.fingerprint, block_size_tokens=other.block_size, block_nbytes=other.block_nbytes,
        dtype=other.dtype, content_fingerprint=other.content_fingerprint,
    )  # fmt: skip
    ticket = worker_pb2.Ticket(writer_id=info.worker_id, writer_incarnation=info.incarnation, layout=layout)
    async with grpc.aio.insecure_channel(unequal_dtypes.local.address("prefill-0")) as channel:
        call = worker_pb2_grpc.PrefillServiceStub(channel).Prefill(
            worker_pb2.PrefillRequest(prompt_token_ids=[1], ticket=ticket), timeout=10
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    for each in (
        other.fingerprint,
        other.content_fingerprint,
        info.layout.fingerprint,
        info.layout.content_fingerprint,
    ):
        assert each in (refused.value.details() or "")
