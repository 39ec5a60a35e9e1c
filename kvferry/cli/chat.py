"""kvferry chat: a conversation, with a person or with a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Annotated

import typer

import kvferry
from kvferry.cli import options, output, timeline
from kvferry.cli.interrupts import CtrlC
from kvferry.client import DEFAULT_ADDRESS, Client, Stream
from kvferry.types import ChatMessage

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    address: options.Address = DEFAULT_ADDRESS,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    timeout: options.Timeout = None,
    model: options.ModelName = "",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.", show_default=False)] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    speculate: options.Speculate = None,
    show_timeline: options.ShowTimeline = False,
) -> None:
    """Talk with the model; it remembers the conversation.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer. When stdin is a pipe, each of its
    lines is one message of the conversation.

    \b
    Examples:
      kvferry chat --system "Answer in one sentence."
      printf 'What is 2+2?\\nAnd twice that?\\n' | kvferry chat --temperature 0
    """
    interactive = sys.stdin.isatty()
    opening = [ChatMessage("system", system)] if system is not None else []
    history = list(opening)
    with (
        output.failures(address),
        Client(address, api_key=api_key, tls=options.client_tls(tls_ca)) as client,
        ExitStack() as stack,
    ):
        ctrl_c = stack.enter_context(CtrlC()) if interactive else None
        if interactive:
            model = model or client.models()[0].name
            output.say(f"{model}: {HELP}")
        for line in _piped() if ctrl_c is None else _typed(ctrl_c):
            if line == "/exit":
                return
            if line == "/reset":
                history = list(opening)
                continue
            if interactive and line.startswith("/"):
                output.say(HELP)
                continue
            history.append(ChatMessage("user", line))
            try:
                with client.chat(
                    history,
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
                    _show(stream, ctrl_c)
            except kvferry.Error as error:
                if not interactive:
                    raise
                history.pop()
                output.say(f"kvferry: {output.sentence(error, address)}")
                continue
            if stream.finish_reason is None and not stream.text:  # stopped before its first word: never asked
                history.pop()
                continue
            history.append(ChatMessage("assistant", stream.text))
            if show_timeline and stream.timeline is not None and stream.usage is not None:
                timeline.show(stream.timeline, stream.usage)


def _show(stream: Stream, ctrl_c: CtrlC | None) -> None:
    """Prints the answer as it comes.  With somebody at the keyboard Ctrl-C stops it, and what came until then is the
    answer."""
    try:
        with nullcontext() if ctrl_c is None else ctrl_c.calling(stream.close):
            for chunk in stream:
                print(chunk.text, end="", flush=True)
    except kvferry.CancelledError:
        if ctrl_c is None:
            raise
        print(" [stopped]", end="")
    print(flush=True)


def _typed(ctrl_c: CtrlC) -> Iterator[str]:
    """Lines from the keyboard until Ctrl-D; Ctrl-C drops the line begun."""
    import readline  # noqa: F401  (gives input() its editing and history)

    while True:
        try:
            with ctrl_c.allowed():
                line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        if stripped := line.strip():
            yield stripped
