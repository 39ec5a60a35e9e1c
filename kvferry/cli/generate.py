"""kvferry generate: continue a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvferry.cli import options, output, timeline
from kvferry.client import DEFAULT_ADDRESS, Client


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    timeout: options.Timeout = None,
    model: options.ModelName = "",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    speculate: options.Speculate = None,
    show_timeline: options.ShowTimeline = False,
    as_json: options.Json = False,
) -> None:
    """Continue a text, as it stands, without a chat template.

    The answer goes to stdout as it comes, all else to stderr.

    \b
    Examples:
      kvferry generate "The capital of France is" --max-tokens 16
      kvferry generate "Once upon a time" --temperature 0.8 --seed 1 --timeline
      cat notes.txt | kvferry generate - --max-tokens 64 --json
    """
    with output.failures(address), Client(address, api_key=api_key, tls=options.client_tls(tls_ca)) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        with client.generate(
            text,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop or (),
            speculate=speculate,
            timeout=timeout,
        ) as stream:
            if as_json:
                output.print_json(stream.result())
                return
            for chunk in stream:
                print(chunk.text, end="", flush=True)
            print()
            completion = stream.result()
        if show_timeline:
            timeline.show(completion.timeline, completion.usage)
