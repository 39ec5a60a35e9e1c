"""What a gateway's process makes of what it was told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway import serving
from gateway.config import GatewayConfig
from gateway.retry_budget import RetryBudget
from gateway.seat import Seat
from services.runtime.startup import StartupError


async def test_the_processes_of_a_gateway_share_its_retry_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[float, int]] = []

    def make(ratio: float, *, num_sharers: int) -> RetryBudget:
        made.append((ratio, num_sharers))
        raise StartupError("this is all")

    config = SimpleNamespace(revision="r", eos_token_ids=())
    monkeypatch.setattr(serving, "open_model", lambda _: SimpleNamespace(config=config))
    monkeypatch.setattr(serving, "registry_of", lambda *_: None)
    monkeypatch.setattr(serving, "RetryBudget", make)
    with pytest.raises(StartupError, match="this is all"):
        await serving.run_gateway(GatewayConfig(retry_ratio=0.3), Seat(1, 4, tmp_path))
    assert made == [(0.3, 4)]
