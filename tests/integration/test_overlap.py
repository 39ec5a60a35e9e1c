"""Blocks travel while the next chunk is computed: only the last chunk's write is exposed."""

from __future__ import annotations

import random

from kvferry import Client
from tests.integration.conftest import Running

NUM_TOKENS = 512  # eight chunks of this cluster's 64 tokens


def fresh_prompt(num_tokens: int) -> list[int]:
    """Tokens that no cache has seen."""
    return [random.randrange(1000, 40000) for _ in range(num_tokens)]


def test_every_chunk_but_the_last_is_written_while_the_prompt_is_computed(cluster: Running, client: Client) -> None:
    answer = client.generate(fresh_prompt(NUM_TOKENS), max_tokens=4, temperature=0, ignore_eos=True).result()
    transfer, decode = answer.timeline.transfer, answer.timeline.decode
    assert transfer is not None
    assert decode is not None
    assert [chunk.num_blocks for chunk in transfer.chunks] == [4] * 8
    computed_s = transfer.chunks[-1].compute_end_s
    for chunk in transfer.chunks[:-1]:
        assert chunk.write_begin_s is not None
        assert chunk.write_end_s is not None
        assert chunk.compute_end_s <= chunk.write_begin_s < chunk.write_end_s < computed_s
    assert transfer.num_hidden_bytes == transfer.num_bytes * 7 // 8
    last_s = transfer.chunks[-1].write_end_s
    assert last_s is not None
    assert transfer.exposed_s >= last_s - computed_s > 0, "the last chunk's blocks can only follow its compute"
    assert decode.first_step_s is not None
    assert answer.timeline.handover_s == transfer.exposed_s + decode.first_step_s
    assert answer.timeline.ticket_s is not None
    assert 0 < answer.timeline.opened_s < answer.timeline.ticket_s < answer.timeline.ttft_s
