"""The narrow formats: split over two workers or on one, the same tokens, whatever else is in their steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvferry import Client
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig
from tests.integration.answers import CHATS, NUM_TOKENS, RAW, lone_answers, split_answers
from tests.integration.conftest import ENVIRONMENT


@pytest.mark.parametrize("dtype", [None, "bfloat16"], ids=["int8 by default", "bfloat16"])
def test_split_equals_alone(dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    config = ClusterConfig(dtype=dtype, grpc_port=0, http_port=0, threads=1, kv_memory="512MiB")
    with LocalCluster.from_config(config, log_dir=tmp_path) as local:
        split = asyncio.run(split_answers(local.grpc_address))
        with Client(local.grpc_address) as client:
            prompts = [client.tokenize(text) for text in RAW] + [client.tokenize(chat) for chat in CHATS]
        alone = asyncio.run(lone_answers(local.address("decode-0"), prompts))
    assert all(answer.timeline.transfer is not None for answer in split)
    assert [list(answer.token_ids) for answer in split] == alone
    assert {len(tokens) for tokens in alone} == {NUM_TOKENS}
    for worker in ("prefill-0", "decode-0"):
        assert "compiled_kernels" in (tmp_path / f"{worker}.log").read_text()
