"""The runner for CUDA with stand-ins for its kernels, graphs and events: everything of it that is not the device's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.engine.batch import Batch, Entry, build_batch
from services.engine.blocks import BlockPool
from services.engine.device_sampler import SamplingColumns
from services.engine.flashinfer_runner import FlashInferRunner
from services.engine.layout import KvLayout
from services.engine.model_config import ModelConfig
from services.engine.model_files import ModelFiles
from services.engine.sampling_params import Drawn, Sampling
from services.engine.scheduler import Limits, Scheduler
from services.engine.sequence import Sequence, SequenceId
from services.engine.weights import Weights, load_weights
from tests.engine.early_chunks import ship
from tests.engine.fake_device import FakeDevice
from tests.engine.paging import GREEDY, PagedModel, assert_likely, decode_together, relative_error
from tests.engine.test_kernels import make_config, make_weights

CONFIGS = {
    "group of 3, untied": {"sharing": 3, "num_kv_heads": 2, "tied": False},
    "group of 7, biased, windowed": {"sharing": 7, "num_kv_heads": 1, "bias": True, "window": 11},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return make_config(**request.param)


@pytest.fixture
def weights(config: ModelConfig) -> Weights:
    return make_weights(config)


def paged(config: ModelConfig, weights: Weights, device: FakeDevice | None, *, max_running: int = 6,
          returns_early: bool = False, num_blocks: int = 96) -> PagedModel:  # fmt: skip
    """With a device by FlashInfer's stand-in, without by torch; both from pools full of NaN, in one order of blocks."""
    made = PagedModel(config, weights, num_blocks=num_blocks, block_size=8, kernels=False)
    if device is not None:
        arena = torch.frombuffer(made.arena, dtype=torch.float32).view(num_blocks, *made.layout.block_shape)
        made.runner = FlashInferRunner(
            config, weights, made.layout, arena, device.kernels, device,
            max_running=max_running, returns_early=returns_early,
        )  # type: ignore[assignment]  # fmt: skip
        made.runner.warm_up()
    return made


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(0, vocab_size, size).tolist() for size in random.integers(1, 40, count)]


def test_chunks_and_decodes_give_the_references_tokens(config: ModelConfig, weights: Weights) -> None:
    device = FakeDevice()
    texts = prompts(6, config.vocab_size)
    found = paged(config, weights, device).greedy(texts, num_tokens=20, chunk=7)
    assert found == paged(config, weights, None).greedy(texts, num_tokens=20, chunk=7)
    assert device.num_replays > 15  # once all prompts are computed


def test_logits_are_the_references(config: ModelConfig, weights: Weights) -> None:
    (ids,) = prompts(1, config.vocab_size)
    ids = ids * 3
    ours, reference = paged(config, weights, FakeDevice()), paged(config, weights, None)
    for chunk in (None, 5):
        assert relative_error(ours.prompt_logits(ids, chunk), reference.prompt_logits(ids, chunk)) < 1e-5


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 5])
def test_batches_between_the_graphs_sizes_decode_as_others(
    config: ModelConfig, weights: Weights, num_sequences: int
) -> None:
    ours, reference = paged(config, weights, FakeDevice()), paged(config, weights, None)
    texts = prompts(num_sequences, config.vocab_size)
    found = decode_together(ours.runner.run, texts, GREEDY, 20, 8)
    assert found == decode_together(reference.runner.run, texts, GREEDY, 20, 8)
    assert ours.runner.num_foreseen == 18  # the first decode comes behind a prompt
    for text, drawn in zip(texts, found, strict=True):
        assert_likely(reference, text, drawn)
        worst = int(reference.prompt_logits([*text, *drawn[:-1]]).argmin())
        with pytest.raises(AssertionError, match="token 19 of"):
            assert_likely(reference, text, [*drawn[:-1], worst])


def test_a_batch_too_large_for_the_graphs_is_computed_without(config: ModelConfig, weights: Weights) -> None:
    device = FakeDevice()
    texts = prompts(6, config.vocab_size)
    found = paged(config, weights, device, max_running=2).greedy(texts, num_tokens=5, chunk=64)
    assert found == paged(config, weights, None).greedy(texts, num_tokens=5, chunk=64)
    assert device.num_replays < 10


def test_seeded_draws_are_those_of_the_host(config: ModelConfig, weights: Weights) -> None:
    (ids,) = prompts(1, config.vocab_size)
    runs = []
    for device in (FakeDevice(), None):
        model = paged(config, weights, device)
        table = model.table(len(ids) + 3)
        wild = [Sampling(temperature=1.2, seed=seed, top_p=0.9, num_logprobs=seed % 2 or None) for seed in range(4)]
        runs.append([model.runner.run(build_batch([Entry(ids, 0, table, s)], 8))[0] for s in wild])
    assert [token.token_id for token in runs[0]] == [token.token_id for token in runs[1]]
    assert len({token.token_id for token in runs[0]}) > 1
    assert runs[0][1].logprob == pytest.approx(runs[1][1].logprob, abs=1e-4)


def test_drafts_are_verified_as_by_the_reference(config: ModelConfig, weights: Weights) -> None:
    (ids,) = prompts(1, config.vocab_size)
    found = []
    for device in (FakeDevice(), None):
        model = paged(config, weights, device)
        table = model.table(len(ids) + 8)
        first = model.runner.run(build_batch([Entry(ids, 0, table, GREEDY)], 8))[0].token_id
        step = Entry([first, 1, 2], len(ids), table, GREEDY, num_drafts=2)
        found.append(model.runner.run(build_batch([step], 8)))
    assert found[0] == found[1]


def test_warming_up_leaves_the_pool_alone(config: ModelConfig, weights: Weights) -> None:
    model = paged(config, weights, FakeDevice())
    assert bytes(model.arena) == b"\xff" * len(model.arena)


def decode(model: PagedModel, limits: Limits, num_sequences: int, num_tokens: int) -> dict[str, list[int]]:
    """Through the scheduler, as the engine does it."""
    scheduler = Scheduler(BlockPool(96), limits)
    texts = prompts(num_sequences, model.runner._model.config.vocab_size)
    tokens: dict[str, list[int]] = {}
    for number, ids in enumerate(texts):
        name = SequenceId(str(number))
        scheduler.add(Sequence(name, ids, GREEDY, num_tokens, frozenset(), [b"root"]))
        tokens[name] = []
    while (plan := scheduler.plan()) is not None:
        for event in scheduler.complete(plan, model.runner.run(build_batch(plan.entries, 8))):
            if (drawn := getattr(event, "drawn", None)) is not None:
                tokens[event.id].append(drawn.token_id)
        scheduler.check_integrity()
    return tokens


@pytest.mark.parametrize("look_ahead", [True, False])
def test_with_a_block_in_hand_the_next_step_is_there_before_it_comes(look_ahead: bool) -> None:
    """30 steps of 5 sequences over blocks of 8 tokens: without, most steps need a block that nobody could foresee."""
    config = make_config(sharing=2)
    weights = make_weights(config)
    limits = Limits(block_size=8, context_length=config.context_length, look_ahead=look_ahead)
    model = paged(config, weights, FakeDevice())
    found = decode(model, limits, 5, 30)
    assert found == decode(paged(config, weights, None), limits, 5, 30)
    if look_ahead:
        assert model.runner.num_foreseen == 28  # the first decode comes behind a prompt
    else:
        assert model.runner.num_foreseen < 20


def test_a_step_that_was_foreseen_and_did_not_come_is_forgotten(config: ModelConfig, weights: Weights) -> None:
    """The sequence ended, and another one decodes in its stead."""
    ours, reference = paged(config, weights, FakeDevice()), paged(config, weights, None)
    first, second = prompts(2, config.vocab_size)
    answers = []
    for model in (ours, reference):
        tables = [model.table(60), model.table(60)]
        drawn = [model.runner.run(build_batch([Entry(ids, 0, table, GREEDY)], 8))[0]
                 for ids, table in zip((first, second), tables, strict=True)]  # fmt: skip
        steps = [
            Entry([token.token_id], len(ids), table, GREEDY)
            for token, ids, table in zip(drawn, (first, second), tables, strict=True)
        ]
        both = model.runner.run(build_batch(steps, 8))
        alone = Entry([both[1].token_id], len(second) + 1, tables[1], GREEDY)
        answers.append(model.runner.run(build_batch([alone], 8)))
    assert answers[0] == answers[1]
    assert ours.runner.num_foreseen == 0


@pytest.mark.parametrize("num_tokens", [1, 9], ids=["by a graph", "without"])
@pytest.mark.parametrize("sampling", [None, GREEDY, Sampling(num_logprobs=2)], ids=["no draw", "a draw", "logprobs"])
@pytest.mark.parametrize("call", ["run", "follow", "logits"])
def test_whatever_thread_asks_a_step_is_computed_by_the_runners_gpu(
    call: str, sampling: Sampling | None, num_tokens: int
) -> None:
    """Of several GPUs each thread has a current one, and the threads that start a worker are not those that step."""
    config = make_config(sharing=2)
    device = FakeDevice()
    model = paged(config, make_weights(config), device)
    batch = chunk(model, model.table(16), 0, num_tokens, sampling)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(getattr(model.runner, call), batch).result()
        thread.submit(model.runner.warm_up).result()
        with pytest.raises(AssertionError, match="current device is another"):
            thread.submit(device.mark).result()


def test_what_draws_depend_on_is_made_while_the_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(sharing=2)
    device = FakeDevice()
    model = paged(config, make_weights(config), device)
    replays: list[int] = []
    of = SamplingColumns.of
    monkeypatch.setattr(SamplingColumns, "of", lambda samples: replays.append(device.num_replays) or of(samples))
    before = device.num_replays
    model.runner.run(chunk(model, model.table(1), 0, 1, Sampling(temperature=1.0, seed=1)))
    assert replays == [before + 1]


@pytest.mark.parametrize("call", ["run", "follow"])
def test_a_decode_waits_for_the_device_once_and_the_next_ones_metadata_is_there_before(call: str) -> None:
    """A first and two that were foreseen.  Of marks, one is waited for that was made behind the step; the other, of what
    the plan before copied, is in the stream before it."""
    config = make_config(sharing=2)
    device = FakeDevice()
    model = paged(config, make_weights(config), device)
    device.is_busy = True
    table = model.table(24)
    getattr(model.runner, call)(chunk(model, table, 0, 9, GREEDY))
    for number, position in enumerate((9, 10, 11)):
        device.log.clear()
        first = len(device.marks)
        getattr(model.runner, call)(chunk(model, table, position, 1, GREEDY))
        uploaded, computed, foreseen = range(first - 1 if number else first, first + 2 if number else first + 3)
        prepare = [] if number else [f"wait {first - 2}", "plan", f"mark {uploaded}"]
        fetch = ["fetch"] if call == "run" else []
        assert device.log == [
            *prepare, "replay", *fetch, f"mark {computed}", f"wait {uploaded}", "plan", f"mark {foreseen}",
            f"wait {computed}",
        ]  # fmt: skip
    assert model.runner.num_foreseen == 2


@pytest.mark.parametrize("sampling", [GREEDY, None])
def test_a_chunk_waits_for_the_device_once(sampling: Sampling | None) -> None:
    config = make_config(sharing=2)
    device = FakeDevice()
    model = paged(config, make_weights(config), device)
    device.is_busy = True
    device.log.clear()
    first = len(device.marks)
    model.runner.run(chunk(model, model.table(9), 0, 9, sampling))
    fetch = [] if sampling is None else ["fetch"]
    assert device.log == ["plan", f"mark {first}", *fetch, f"mark {first + 1}", f"wait {first + 1}"]


def test_a_chunk_that_returns_early_is_not_planned_over_copies_of_the_one_before() -> None:
    """The planners copy from memory that they use again."""
    config = make_config(sharing=2)
    device = FakeDevice()
    model = paged(config, make_weights(config), device, returns_early=True)
    device.is_busy = True
    first = len(device.marks)
    table = model.table(16)
    for start in (0, 8):
        device.log.clear()
        model.runner.run(chunk(model, table, start, 8, None))
    copied, ready = first, first + 1
    assert device.log == [f"wait {copied}", "plan", f"mark {first + 2}", f"mark {first + 3}", f"wait {ready}"]


def chunk(model: PagedModel, table: list[int], start: int, num_tokens: int, sampling: Sampling | None) -> Batch:
    return build_batch([Entry([3] * num_tokens, start, table, sampling)], 8)


def reference_draw(config: ModelConfig) -> Drawn:
    model = paged(config, make_weights(config), None)
    table = model.table(64)
    drawn = [model.runner.run(chunk(model, table, at, 8, GREEDY))[0] for at in (0, 8, 16)]
    assert isinstance(drawn[2], Drawn)
    assert drawn[2].token_id > 0
    return drawn[2]


def test_a_step_that_draws_waits_once_and_one_that_draws_nothing_waits_for_the_one_before() -> None:
    config = make_config(sharing=2)
    device = FakeDevice()
    model = paged(config, make_weights(config), device, returns_early=True)
    device.is_busy = True
    table = model.table(64)
    assert model.runner.run(chunk(model, table, 0, 8, None)) == []
    first = model.runner.ready
    assert not first.done()
    assert model.runner.run(chunk(model, table, 8, 8, None)) == []
    second = model.runner.ready
    assert first.done()
    assert not second.done()
    (drawn,) = model.runner.run(chunk(model, table, 16, 8, GREEDY))
    assert drawn == reference_draw(config)
    assert model.runner.ready is None


def test_chunks_arrive_elsewhere_while_the_next_ones_compute() -> None:
    config = make_config(sharing=2)
    weights = make_weights(config)
    layout = paged(config, weights, None).layout
    device = FakeDevice(is_busy=True)

    def make(arena: torch.Tensor) -> FlashInferRunner:
        return FlashInferRunner(
            config, weights, layout, arena, device.kernels, device, max_running=1, returns_early=True
        )

    ids = prompts(1, config.vocab_size)[0] * 20
    shipped = ship(make, lambda: None, layout, ids, None)
    assert shipped.num_pending == shipped.num_chunks > 3
    assert shipped.arrived == shipped.sent
    assert any(shipped.arrived[-layout.block_nbytes :])


def test_a_step_that_may_not_return_early_does_not() -> None:
    config = make_config(sharing=2)
    device = FakeDevice()
    model = paged(config, make_weights(config), device, returns_early=False)
    device.is_busy = True
    model.runner.run(chunk(model, model.table(8), 0, 8, None))
    assert model.runner.ready is None
    assert device.marks[-1].done()


def test_a_layer_of_a_pool_is_what_flashinfer_calls_a_cache() -> None:
    """Of the strides that its kernels read, only the page's is wider than in a cache of one layer."""
    layout = KvLayout("r", "bfloat16", 16, 4, 2, 64)
    arena = torch.empty((5, *layout.block_shape), dtype=torch.bfloat16)
    keys, values = arena[:, 1].unbind(1)
    assert keys.stride() == values.stride() == (4 * 2 * 16 * 2 * 64, 2 * 64, 64, 1)


def test_smollm2_in_bfloat16_draws_what_float32_finds_likely(smollm2: ModelFiles, smollm2_weights: Weights) -> None:
    config = smollm2.config
    reference = PagedModel(config, smollm2_weights, num_blocks=16)
    layout = replace(reference.layout, dtype="bfloat16")
    arena = torch.zeros((16, *layout.block_shape), dtype=torch.bfloat16)
    weights = load_weights(config, smollm2.path, "bfloat16")
    device = FakeDevice()
    runner = FlashInferRunner(
        config, weights, layout, arena, device.kernels, device, max_running=2, returns_early=False
    )
    runner.warm_up()
    texts = [smollm2.tokenizer.encode(text, add_special=True) for text in ("The capital of France is", "1, 2, 3,")]
    for text, drawn in zip(texts, decode_together(runner.run, texts, GREEDY, 24, 16), strict=True):
        assert_likely(reference, text, drawn)


def test_smollm2_gives_its_tokens(smollm2: ModelFiles, smollm2_weights: Weights) -> None:
    texts = [smollm2.tokenizer.encode(text, add_special=True) for text in ("The capital of France is", "1, 2, 3,")]
    found = paged(smollm2.config, smollm2_weights, FakeDevice(), max_running=2).greedy(texts, num_tokens=8, chunk=4)
    assert found == paged(smollm2.config, smollm2_weights, None).greedy(texts, num_tokens=8, chunk=4)
