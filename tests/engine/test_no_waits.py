"""A step asks nothing of the device that waits for it: every call of torch is looked at, on its meta device, which has no
numbers to look at.  What the kernels do inside is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from services.engine import device
from services.engine.batch import Batch, Entry, build_batch
from services.engine.device import pinned
from services.engine.flashinfer_runner import FlashInferRunner
from services.engine.layout import KvLayout
from services.engine.sampling_params import Sampling
from services.engine.weights import weights_on
from tests.engine.fake_device import FakeDevice
from tests.engine.only_on import OnlyOn
from tests.engine.paging import GREEDY
from tests.engine.test_kernels import make_config, make_weights

META = torch.device("meta")
WILD = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)
aten = torch.ops.aten
# What looks at numbers, or has as many results as these say.
WAITING = {
    aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2,
    aten.repeat_interleave, aten.bincount,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class NoLiterals(TorchFunctionMode):
    """A list that becomes a tensor of the device is copied there, which the calls beneath do not show."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            assert kwargs.get("device") is None or torch.device(kwargs["device"]).type == "cpu", "a list is copied"
        return func(*args, **kwargs)


class NoWaits(OnlyOn):
    def __init__(self, place: torch.device, is_pinned: Callable[[torch.Tensor], bool]) -> None:
        super().__init__(place)
        self._is_pinned = is_pinned

    def check_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = args[0] if func.overloadpacket is aten._to_copy else args[1]
        assert func.overloadpacket in (aten._to_copy, aten.copy_), f"{func} mixes places"
        assert kwargs.get("non_blocking") or args[2:3] == (True,), "a copy that is waited for"
        assert self._is_pinned(source), "a copy from memory that is not pinned may be waited for"

    def check_call(self, func: Any, args: tuple[Any, ...]) -> None:
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        if func.overloadpacket in INDEXING:
            kinds = {index.dtype for index in args[1] if index is not None}
            assert kinds <= {torch.int32, torch.int64}, "an index of booleans is counted by the host"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> NoWaits:
    """The host's memory is pinned for the meta device, if the code says so."""
    kept: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.clone())
        return kept[-1]

    def is_pinned(tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(address == one.untyped_storage().data_ptr() for one in kept)

    monkeypatch.setattr(device, "PINNED_FOR", frozenset({"meta"}))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return NoWaits(META, is_pinned)


def decodes(count: int, *samplings: Sampling | None) -> Batch:
    return build_batch(
        [Entry([4], 7 + n, [2 * n, 2 * n + 1, 30 + n], samplings[n % len(samplings)]) for n in range(count)], 8
    )


STEPS = {
    "a chunk": build_batch([Entry([3] * 9, 8, [0, 1, 2], None)], 8),
    "prompts and decodes": build_batch([Entry([1], 9, [3, 4], WILD), Entry([5] * 9, 0, [5, 6], GREEDY)], 8),
    "drafts": build_batch([Entry([1, 2, 3], 9, [3, 4], GREEDY, num_drafts=2)], 8),
    "decodes": decodes(3, GREEDY),
    "seeded decodes": decodes(3, WILD, GREEDY),
    "decodes of which one draws nothing": decodes(3, WILD, None),
    "more decodes than the graphs take": decodes(9, WILD, GREEDY),
}


@pytest.mark.parametrize("call", ["run", "follow"])
@pytest.mark.parametrize("batch", STEPS.values(), ids=STEPS.keys())
def test_a_step_waits_for_nothing_but_marks(batch: Batch, call: str, watched: NoWaits) -> None:
    """Twice, so that what is foreseen is seen, too."""
    config = make_config(sharing=3, window=11, bias=True)
    layout = KvLayout(config.revision, "float32", 8, config.num_layers, config.num_kv_heads, config.head_dim)
    arena = torch.empty((40, *layout.block_shape), device=META)
    on_meta = FakeDevice(place="meta")
    runner = FlashInferRunner(
        config, weights_on(make_weights(config), META), layout, arena, on_meta.kernels, on_meta,
        max_running=4, returns_early=False,
    )  # fmt: skip
    runner.warm_up()
    with watched, NoLiterals():
        for _ in range(2):
            getattr(runner, call)(batch)
    assert watched.num_copies


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda numbers: numbers.nonzero(), "waits for the device"),
        (lambda numbers: numbers[0].item(), "waits for the device"),
        (lambda numbers: bool(numbers[0]), "waits for the device"),
        (lambda numbers: numbers[numbers > 0], "counted by the host"),
        (lambda numbers: numbers.masked_select(numbers > 0), "waits for the device"),
        (lambda numbers: torch.tensor([1], device=numbers.device), "a list is copied"),
        (lambda numbers: torch.ones(4).to(numbers.device), "is waited for"),
        (lambda numbers: torch.ones(4).to(numbers.device, non_blocking=True), "not pinned"),
        (lambda numbers: numbers.copy_(torch.ones(4)), "is waited for"),
        (lambda numbers: numbers.copy_(torch.ones(4), non_blocking=True), "not pinned"),
    ],
)
def test_what_waits_is_seen(ask: Callable[[torch.Tensor], Any], says: str, watched: NoWaits) -> None:
    with watched, NoLiterals(), pytest.raises(AssertionError, match=says):
        ask(torch.empty(4, device=META))


def test_copies_off_the_device_are_seen(watched: NoWaits) -> None:
    with watched, pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        torch.empty(4, device=META).cpu()


def test_pinned_copies_pass(watched: NoWaits) -> None:
    with watched:
        pinned(torch.ones(4), META).to(META, non_blocking=True)
        torch.empty(4, device=META).copy_(pinned(torch.ones(4), META), non_blocking=True)
    assert watched.num_copies == 2
