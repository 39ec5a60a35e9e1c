"""Workers on one GPU: the answers of a prefill and a decode worker are those of the decode worker alone."""

from __future__ import annotations

import pytest

from kvferry.cli.cluster import Timing
from tests.integration.answers import RAW, one_by_one
from tests.integration.conftest import started

pytestmark = pytest.mark.gpu

START_S = 1800.0  # kernels that nobody has compiled here before


@pytest.mark.usefixtures("place")
def test_split_equals_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    logs, timing = tmp_path_factory.mktemp("logs"), Timing(start_s=START_S)
    with started(logs, timing=timing, devices=("cuda:0",), dtype="bfloat16") as running:
        running.wait_routable()
        for answer, alone in one_by_one(running.address, running.local.address("decode-0"), RAW):
            assert answer.timeline.prefill_worker == "prefill-0"
            assert answer.timeline.transfer is not None
            assert answer.timeline.transfer.num_blocks > 0
            assert list(answer.token_ids) == alone
        running.assert_settles(10.0)
