"""Processes of one gateway share a tenant's quota."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.quotas import UNLIMITED, Quota, QuotaBook, Quotas
from gateway.seat import Seat
from gateway.shared_quotas import SharedQuotas
from kvferry.errors import OverloadedError

NUM_PROCESSES = 3
QUOTAS = (Quota(6, 200, 3), Quota(requests_per_minute=4), Quota(max_streams=2))
STEPS = st.lists(
    st.tuples(
        st.integers(0, NUM_PROCESSES - 1),
        st.sampled_from("ab"),
        st.sampled_from(QUOTAS),
        st.integers(1, 60),
        st.floats(0, 20),  # seconds since the one before
        st.booleans(),  # whether the oldest stream ends first
    ),
    max_size=40,
)


def seats(folder: Path, count: int = NUM_PROCESSES) -> list[Seat]:
    return [Seat(number, count, folder) for number in range(count)]


def verdict(quotas: Quotas, tenant: str, quota: Quota, num_prompt_tokens: int, now_s: float) -> tuple[str, float]:
    try:
        quotas.begin(tenant, quota, num_prompt_tokens, now_s)
    except OverloadedError as error:
        return error.message, error.retry_after_s or -1.0
    return "", 0.0


@settings(deadline=None, max_examples=50)
@given(STEPS)
def test_together_they_let_in_what_one_would(
    steps: list[tuple[int, str, Quota, int, float, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shared = [SharedQuotas(seat) for seat in seats(Path(folder))]
        one, now_s = QuotaBook(), 1000.0
        begun: list[tuple[int, str, int]] = []
        for process, tenant, quota, num_tokens, gap_s, ends in steps:
            now_s += gap_s
            if ends and begun:
                of_process, of_tenant, num_output = begun.pop(0)
                shared[of_process].end(of_tenant, num_output)
                one.end(of_tenant, num_output)
            expected = verdict(one, tenant, quota, num_tokens, now_s)
            assert verdict(shared[process], tenant, quota, num_tokens, now_s) == expected
            if expected == ("", 0.0):
                begun.append((process, tenant, num_tokens))


def test_who_has_no_quota_has_no_account(tmp_path: Path) -> None:
    quotas = SharedQuotas(Seat(0, 1, tmp_path))
    for tenant in ("", "a"):
        quotas.begin(tenant, UNLIMITED, 1, 0.0)
        quotas.end(tenant, 1)
    assert not list((tmp_path / "quotas").iterdir())
    quotas.begin("a", Quota(max_streams=1), 1, 0.0)
    quotas.begin("a", UNLIMITED, 1, 0.0)  # the file of keys has changed; what was used stays used
    with pytest.raises(OverloadedError, match="2 requests at a time"):
        quotas.begin("a", Quota(max_streams=1), 1, 0.0)


def test_streams_of_a_process_that_has_ended_are_given_back_and_what_it_used_is_not(tmp_path: Path) -> None:
    quota = Quota(requests_per_minute=5, max_streams=2)
    first, second = (SharedQuotas(seat) for seat in seats(tmp_path, 2))
    first.begin("a", quota, 1, 0.0)
    second.begin("a", quota, 1, 0.0)
    with pytest.raises(OverloadedError, match="2 requests at a time"):
        first.begin("a", quota, 1, 0.0)
    successor = SharedQuotas(Seat(1, 2, tmp_path))
    for quotas in (first, successor, first):  # so that requests alone are in the way
        quotas.begin("a", Quota(requests_per_minute=5), 1, 0.0)
    with pytest.raises(OverloadedError, match="5 requests a minute"):
        successor.begin("a", Quota(requests_per_minute=5), 1, 0.0)


def test_a_lock_that_is_not_given_back_costs_a_refusal_and_no_more(tmp_path: Path) -> None:
    quota, quotas = Quota(max_streams=1, tokens_per_minute=600), SharedQuotas(Seat(0, 1, tmp_path), lock_timeout_s=0.01)
    quotas.begin("a", quota, 1, 0.0)
    with (tmp_path / "quotas" / "a").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        quotas.end("a", 900)  # is told later
        with pytest.raises(OverloadedError) as caught:
            quotas.begin("a", quota, 1, 0.0)
        assert (caught.value.reason, caught.value.retry_after_s) == ("QUOTA_BUSY", 0.5)
    with pytest.raises(OverloadedError, match="600 tokens a minute"):  # no stream is in the way any more
        quotas.begin("a", quota, 1, 0.0)
    quotas.begin("a", quota, 1, 120.0)


PROCESS = """
import sys, time
from pathlib import Path
from gateway.quotas import Quota
from gateway.seat import Seat
from gateway.shared_quotas import SharedQuotas
from kvferry.errors import OverloadedError
quotas = SharedQuotas(Seat(int(sys.argv[1]), 2, Path(sys.argv[2])), lock_timeout_s=60)
let_in, now_s = 0, float(sys.argv[3])
for _ in range(400):
    try:
        quotas.begin("a", Quota(requests_per_minute=500), 1, now_s)
    except OverloadedError:
        continue
    quotas.end("a", 1)
    let_in += 1
print(let_in)
"""


def test_two_processes_at_once_let_in_no_more_and_no_fewer(tmp_path: Path) -> None:
    now_s = str(time.monotonic())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), str(tmp_path), now_s], stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    assert sum(int(process.communicate(timeout=120)[0]) for process in processes) == 500
