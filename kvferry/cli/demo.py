"""kvferry demo: the whole thing once, from nothing to an answer and its timeline."""

from __future__ import annotations

from typing import Annotated

import typer

from kvferry.cli import options, output, timeline
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.interrupts import Interrupts
from kvferry.cli.members import DEFAULT_MODEL, ClusterConfig, clone_root
from kvferry.cli.progress import StartProgress
from kvferry.cli.serve import stop
from kvferry.client import Client

DEFAULT_PROMPT = "Why is the sky blue? Answer in two sentences."


def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask.")] = DEFAULT_PROMPT,
    model: options.ServedModel = DEFAULT_MODEL,
    dtype: options.Dtype = None,
    prefill: options.NumPrefill = 1,
    decode: options.NumDecode = 1,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    threads: options.Threads = None,
    kv_memory: options.KvMemory = None,
    log_dir: options.LogDir = None,
    log_level: options.Level = options.LogLevel.INFO,
) -> None:
    """Start a cluster, stream the answer to one question, show where its time went, stop.

    Runs beside a `kvferry serve`: it picks free ports. Needs a clone of the repository.

    \b
    Examples:
      kvferry demo
      kvferry demo "Name three rivers in Africa." --max-tokens 64
    """
    config = ClusterConfig(
        model=model,
        dtype=dtype,
        num_prefill=prefill,
        num_decode=decode,
        grpc_port=0,
        http_port=0,
        threads=threads,
        kv_memory=kv_memory,
        log_level=log_level.value,
    )
    progress = StartProgress()
    with output.failures(), Interrupts() as interrupts:
        cluster = LocalCluster.from_config(
            config, log_dir=log_dir or clone_root() / "build" / "logs" / "demo", on_event=progress.on_event
        )
        try:
            with progress.show([member.name for member in cluster.members], cluster.doing):
                cluster.start()
            interrupts.check()
            _ask(cluster, prompt, max_tokens, temperature, seed)
        finally:
            stop(cluster)


def _ask(
    cluster: LocalCluster, prompt: str, max_tokens: int | None, temperature: float | None, seed: int | None
) -> None:
    output.say(f"\n> {prompt}")
    with (
        Client(cluster.grpc_address) as client,
        client.chat(
            [{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=temperature, seed=seed
        ) as stream,
    ):
        for chunk in stream:
            print(chunk.text, end="", flush=True)
        print("\n")
        completion = stream.result()
    timeline.show(completion.timeline, completion.usage)
    output.say("")
