"""Lists of processors, and threads that stay on theirs."""

from __future__ import annotations

import os
import threading

import pytest

from services.runtime.cpus import format_cpus, leave, parse_cpus, pinned, require_allowed
from services.worker.config import WorkerConfig

ALLOWED = sorted(os.sched_getaffinity(0))
several = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two processors")


def test_lists_are_read_and_written() -> None:
    assert parse_cpus("0-3,6") == {0, 1, 2, 3, 6}
    assert parse_cpus("") == frozenset()
    assert format_cpus({6, 0, 1, 3, 2}) == "0-3,6"
    assert format_cpus(parse_cpus("5, 1-2")) == "1-2,5"


@pytest.mark.parametrize("text", ["0-", "a", "3-1", "-1", "0,,1", "0-99999", "0;1"])
def test_what_is_no_list_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a list of processors; write it like 0-3,6"):
        parse_cpus(text)
    with pytest.raises(ValueError, match=r"^--cpus: .* is not a list"):
        WorkerConfig(cpus=text)


def test_processors_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no processor 4000-4001 here; this process may use"):
        require_allowed(parse_cpus("4000-4001"))
    with pytest.raises(ValueError, match="--cpus: there is no processor 4000 here"):
        WorkerConfig(cpus="4000")


def test_fewer_processors_than_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="names 1 processors for 2 threads; name more, or lower --threads"):
        WorkerConfig(cpus=str(ALLOWED[0]), threads=2)


@several
def test_what_a_pinned_thread_starts_is_pinned_too_and_the_thread_itself_goes_back() -> None:
    found = []
    with pinned(frozenset(ALLOWED[:1])):
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert found == [{ALLOWED[0]}]
    assert os.sched_getaffinity(0) == set(ALLOWED)


@several
def test_the_rest_leaves_the_processors_that_compute_unless_there_are_no_others() -> None:
    def in_thread(cpus: frozenset[int]) -> set[int]:
        found = []

        def run() -> None:
            leave(cpus)
            found.append(os.sched_getaffinity(0))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    assert in_thread(frozenset(ALLOWED[:1])) == set(ALLOWED[1:])
    assert in_thread(frozenset(ALLOWED)) == set(ALLOWED)
    assert in_thread(frozenset()) == set(ALLOWED)
