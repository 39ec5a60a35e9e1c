"""The torch reference on a device: with numbers on the CPU, where a stand-in is the device, and without on torch's meta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from services.engine.batch import Batch, Entry, build_batch
from services.engine.layout import KvLayout
from services.engine.runner import DeviceTorchRunner
from services.engine.weights import weights_on
from tests.engine.fake_device import FakeDevice
from tests.engine.only_on import OnlyOn
from tests.engine.paging import GREEDY, PagedModel
from tests.engine.test_kernels import make_config, make_weights

META = torch.device("meta")
WINDOWED = make_config(sharing=3, window=11, bias=True)


def on_fake(device: FakeDevice | None) -> PagedModel:
    """None: the CPU."""
    weights = make_weights(WINDOWED)
    made = PagedModel(WINDOWED, weights, num_blocks=48, block_size=8, kernels=False)
    if device is not None:
        arena = torch.frombuffer(made.arena, dtype=torch.float32).view(48, *made.layout.block_shape)
        made.runner = DeviceTorchRunner(WINDOWED, weights, made.layout, arena, device)  # type: ignore[assignment]
        made.runner.warm_up()
    return made


def test_tokens_are_those_of_the_cpu() -> None:
    texts = [[5] * 30, [7, 8, 9], [11] * 14]
    found = on_fake(FakeDevice()).greedy(texts, num_tokens=9, chunk=7)
    assert found == on_fake(None).greedy(texts, num_tokens=9, chunk=7)


@pytest.mark.parametrize("call", ["run", "follow", "logits"])
def test_a_step_has_ended_when_it_returns_also_if_it_draws_nothing(call: str) -> None:
    """Without logits to copy, nothing else would wait for its KV."""
    device = FakeDevice()
    model = on_fake(device)
    device.is_busy = True
    num_before = len(device.marks)
    getattr(model.runner, call)(build_batch([Entry([3] * 9, 0, model.table(9), None)], 8))
    assert len(device.marks) == num_before + 1
    assert device.marks[-1].done()


def mixed() -> Batch:
    """A chunk behind others, a whole prompt, decodes of unequal length; two draw."""
    return build_batch(
        [
            Entry([1], 20, [0, 1, 2], GREEDY), Entry([2], 3, [3], GREEDY), Entry([4] * 5, 30, [4, 5, 6, 7, 8], None),
            Entry([6] * 9, 0, [9, 10], None),
        ],
        8,
    )  # fmt: skip


@pytest.mark.parametrize("call", [lambda runner: runner.follow(mixed()), lambda runner: runner.warm_up()])
@pytest.mark.parametrize("window", [None, 11])
def test_all_that_a_step_computes_with_is_on_the_device(
    window: int | None, call: Callable[[DeviceTorchRunner], None]
) -> None:
    config = make_config(sharing=3, window=window, bias=True, tied=False)
    layout = KvLayout(config.revision, "float32", 8, config.num_layers, config.num_kv_heads, config.head_dim)
    arena = torch.empty((11, *layout.block_shape), device=META)
    runner = DeviceTorchRunner(config, weights_on(make_weights(config), META), layout, arena, FakeDevice(place="meta"))
    with OnlyOn(META) as watched:
        call(runner)
    assert watched.num_copies
