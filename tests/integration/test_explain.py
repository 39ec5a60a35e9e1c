"""A real cluster reckons with what its workers measured, and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry import Client, NotFoundError
from kvferry.api.directory.v1 import directory_pb2
from services.planner.calibrate.fit import SumsFit, spread_of
from services.planner.simulator.cost_model import CostModel
from tests.integration.conftest import Running, started

PROMPT = list(range(1000, 1300))


@pytest.fixture(scope="module")
def reckoning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two decode workers, and routing by cost."""
    environment = {"KVFERRY_CHUNK_TOKENS": "64"}
    with started(tmp_path_factory.mktemp("logs"), environment, num_decode=2) as running:
        running.wait_routable()
        running.wait_until(lambda: len(running.cluster_view().workers) == 3, 30, "all workers are seen")
        yield running


def test_a_route_is_explained_with_measured_rates(reckoning: Running) -> None:
    with Client(reckoning.address) as client:
        first = client.generate(PROMPT, max_tokens=24, temperature=0, ignore_eos=True).result()
        assert first.timeline.prefill_worker == "prefill-0"

        def measured() -> bool:
            loads = {w.info.worker_id: w.load for w in reckoning.cluster_view().workers}
            prefill, decode = loads["prefill-0"], loads[first.timeline.decode_worker]
            cached = decode.blocks.cached
            return bool(
                prefill.prefill_tokens_per_s and prefill.transfer_bytes_per_s and prefill.transfer_round_trip_s
                and decode.decode_step_base_s and cached
            )  # fmt: skip

        reckoning.wait_until(measured, 20, "the workers report what they measured")
        again = client.generate([*PROMPT, *range(2000, 2200)], max_tokens=4, temperature=0).result()
        (decision,) = client.explain_route(again.request_id)
        assert (decision.policy, decision.num_prompt_tokens) == ("kv-aware", 500)
        (chosen,) = [option for option in decision.options if option.chosen]
        assert chosen == decision.options[0]
        assert (chosen.prefill_worker, chosen.decode_worker) == (
            again.timeline.prefill_worker, again.timeline.decode_worker,
        )  # fmt: skip
        assert again.timeline.decode_worker == first.timeline.decode_worker, "who holds the prefix"
        assert chosen.num_decode_cached_tokens == 288
        assert {option.decode_worker for option in decision.options} == {"decode-0", "decode-1"}
        speed = next(
            w.load.prefill_tokens_per_s for w in reckoning.cluster_view().workers if w.info.worker_id == "prefill-0"
        )
        split = next(option for option in decision.options if option.prefill_worker)
        # The rate moves a little with every chunk: within a factor of two it is the worker's and not the prior.
        assert 0.5 < split.prefill_s * speed / (500 - split.num_prefill_cached_tokens) < 2


def test_the_command_line_explains(reckoning: Running) -> None:
    with Client(reckoning.address) as client:
        answer = client.generate("The capital of France is", max_tokens=2).result()
        with pytest.raises(NotFoundError, match="not among the last 1000") as error:
            client.explain_route("nobody")
        assert error.value.reason == "UNKNOWN_REQUEST"
    command = [sys.executable, "-m", "kvferry.cli", "explain", answer.request_id, "--address", reckoning.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"{answer.usage.num_prompt_tokens} prompt tokens" in done.stdout
    assert sum(line.startswith("*") for line in done.stdout.splitlines()) == 1


def test_what_was_served_is_told_for_plans(reckoning: Running) -> None:
    with Client(reckoning.address) as client:
        answer = client.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True).result()
        served = client.traffic().served[-1]
    assert (served.num_prompt_tokens, served.num_output_tokens) == (len(PROMPT), 8)
    assert served.num_cached_tokens == answer.usage.num_cached_tokens
    assert served.tpot_s is not None
    assert served.itl_p99_s is not None
    assert 0 < served.ttft_s + 7 * served.tpot_s == pytest.approx(served.total_s, rel=0.01)
    assert served.total_s < served.age_s < 60


def test_costs_come_from_the_steps_that_clients_asked_for(reckoning: Running, tmp_path: Path) -> None:
    with Client(reckoning.address) as client:
        client.generate(range(3000, 3300), max_tokens=40, temperature=0, ignore_eos=True).result()
    told = [reckoning.stats(name).state.load.step_sums for name in ("prefill-0", "decode-0", "decode-1")]
    sums = [each for each in told if each.shares]
    reckoning.wait_until(lambda: _sums(reckoning) == sums, 20, "the workers report their steps")
    out = tmp_path / "costs.json"
    command = [sys.executable, "-m", "kvferry.cli", "calibrate", "--live", reckoning.address, "--json", str(out)]
    subprocess.run([*command, "--seconds", "0"], capture_output=True, text=True, timeout=60, check=True)
    read = json.loads(out.read_text())
    assert read["steps"] == sum(each.shares[0] for each in sums) >= 39
    scatter = [sum(each) for each in zip(*(s.scatter for s in sums), strict=True)]
    assert scatter[0] >= 10
    costs = CostModel(**read["costs"])
    prices = (
        costs.step_s, costs.prefill_token_s, costs.attention_pair_s, costs.decode_sequence_s, costs.decode_context_token_s,
    )  # fmt: skip
    predicted = sum(n * price for s in sums for n, price in zip(s.shares, prices, strict=True))
    assert predicted == pytest.approx(sum(s.seconds for s in sums), rel=0.01)
    assert costs.spread == spread_of(scatter, SumsFit(prices, read["rms_error"]))
    assert read["transfer_measured"]
    assert read["block_size"] == 16
    idle = subprocess.run([*command, "--seconds", "0.1"], capture_output=True, text=True, timeout=60, check=False)
    assert idle.returncode == 1
    assert "no worker computed anything in 0.1 s" in idle.stderr


def _sums(running: Running) -> list[directory_pb2.StepSums]:
    by_name = {w.info.worker_id: w.load.step_sums for w in running.cluster_view().workers}
    return [by_name[name] for name in ("prefill-0", "decode-0", "decode-1") if by_name[name].shares]


def test_a_plan_for_what_was_served(reckoning: Running) -> None:
    with Client(reckoning.address) as client:
        for number in range(3):
            client.generate(range(4000 + number, 4300), max_tokens=8, temperature=0, ignore_eos=True).result()
    quick = ("--devices", "h100", "--seeds", "1", "--no-sensitivity", "--slo", "ttft=5s")
    command = [sys.executable, "-m", "kvferry.cli", "plan", "--live", reckoning.address, *quick]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "100.0% of them within ttft=5s" in done.stdout
    assert "; smollm2-135m in bf16" in done.stdout
    assert "Do not split" in done.stdout
