"""Load tools of others, against the OpenAI door.  They are not installed with kvferry: each brings gigabytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers

from services.engine.checkpoint import DEFAULT_MODEL
from services.engine.model_files import open_model
from tests.integration.conftest import Running

TIMEOUT_S = 240
TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_REQUESTS, NUM_PROMPT, NUM_OUTPUT = 4, 32, 8


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the model hub that holds the tokenizer alone, so that nobody asks the network."""
    home = tmp_path_factory.mktemp("hub")
    model = home / "hub" / f"models--{TOKENIZER.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    gguf = open_model(DEFAULT_MODEL).path
    for each in (transformers.AutoTokenizer, transformers.AutoConfig):
        each.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(model / "snapshots" / ("0" * 40))
    return home


def run(hub: Path, tool: str, *arguments: str) -> None:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not on the PATH: pipx install {tool}")
    ours = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [path, *arguments], env=inherited | ours, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_guidellm(cluster: Running, hub: Path, tmp_path: Path) -> None:
    report = tmp_path / "guidellm.json"
    run(
        hub,
        "guidellm", "run", "--disable-progress", "--output", f"kind=json,path={report}",
        "--backend", f"kind=openai_http,target={cluster.http_url}", "--tokenizer", f"kind=hf_auto,model={TOKENIZER}",
        "--profile", "kind=constant,rate=1", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--data", f"kind=synthetic_text,prompt_tokens={NUM_PROMPT},output_tokens={NUM_OUTPUT}",
    )  # fmt: skip
    (found,) = json.loads(report.read_text())["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (NUM_REQUESTS, 0, 0)
    tokens = found["metrics"]["output_token_count"]["successful"]
    assert tokens["total_sum"] == NUM_REQUESTS * NUM_OUTPUT
    assert found["metrics"]["time_to_first_token_ms"]["successful"]["min"] > 0


def test_aiperf(cluster: Running, hub: Path, tmp_path: Path) -> None:
    run(
        hub,
        "aiperf", "profile", "--model", DEFAULT_MODEL, "--url", cluster.http_url, "--endpoint-type", "chat",
        "--streaming", "--tokenizer", TOKENIZER, "--synthetic-input-tokens-mean", str(NUM_PROMPT),
        "--output-tokens-mean", str(NUM_OUTPUT), "--request-count", str(NUM_REQUESTS), "--concurrency", "1",
        "--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--ui", "none", "--artifact-dir", str(tmp_path),
    )  # fmt: skip
    found = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == NUM_REQUESTS
    assert found["output_token_count"]["sum"] == NUM_REQUESTS * NUM_OUTPUT
    assert found["time_to_first_token"]["min"] > 0
