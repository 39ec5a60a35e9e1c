"""Options that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from kvferry.types import TlsConfig


class LogLevel(enum.Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class WhenToSpeculate(enum.Enum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


ADDRESS_ENV = "KVFERRY_ADDRESS"
API_KEY_ENV = "KVFERRY_API_KEY"

_TALK, _SAMPLE, _RUN = "Gateway", "Sampling", "Cluster"

Address = Annotated[
    str,
    typer.Option(
        envvar=ADDRESS_ENV,
        help="host:port of the gateway's gRPC server; of several, with commas.",
        rich_help_panel=_TALK,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar=API_KEY_ENV,
        help="For a gateway that wants one; better in the environment, for others see command lines.",
        show_default=False,
        rich_help_panel=_TALK,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.001, help="Seconds the call may take.", show_default=False, rich_help_panel=_TALK),
]
ModelName = Annotated[
    str, typer.Option("--model", help="Model to ask for; the gateway's only one by default.", rich_help_panel=_TALK)
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        envvar="KVFERRY_TLS_CA",
        help="Use TLS, and believe the authority in this PEM file.",
        show_default=False,
        rich_help_panel=_TALK,
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Most tokens to generate.", show_default=False, rich_help_panel=_SAMPLE)
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False, rich_help_panel=_SAMPLE)]
TopP = Annotated[
    float | None, typer.Option(help="Nucleus sampling, in (0, 1].", show_default=False, rich_help_panel=_SAMPLE)
]
TopK = Annotated[
    int | None, typer.Option(help="Keep the k likeliest tokens; 0 is off.", show_default=False, rich_help_panel=_SAMPLE)
]
Seed = Annotated[
    int | None, typer.Option(help="Makes sampling repeatable.", show_default=False, rich_help_panel=_SAMPLE)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this text; may be given again.", show_default=False, rich_help_panel=_SAMPLE),
]
Speculate = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess tokens from the text so far, several a step; the worker's choice by default.",
        show_default=False,
        rich_help_panel=_SAMPLE,
    ),
]
WorkersSpeculate = Annotated[
    WhenToSpeculate | None,
    typer.Option(
        "--speculate",
        help="Whether workers guess tokens where a request does not say; off by default.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
ShowTimeline = Annotated[bool, typer.Option("--timeline", help="Print where the request's time went.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

ServedModel = Annotated[
    str,
    typer.Option(
        "--model",
        help="A .gguf file, a Hugging Face directory or id, or the default's name.",
        rich_help_panel=_RUN,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Type of weights and KV: float32, bfloat16, float16 or int8 (weights); auto by default.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="What workers compute on: cpu (the default), cuda or cuda:N. Given several times, they go to the workers in "
        "turn, prefill workers first.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
RoleDtype = Annotated[
    str | None, typer.Option(help="Type for this role alone.", show_default=False, rich_help_panel=_RUN)
]
RoleBlockSize = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens in a KV block, for this role alone.", show_default=False, rich_help_panel=_RUN),
]
RoleTp = Annotated[
    int,
    typer.Option(min=1, help="Ranks (tensor parallelism) of each worker of this role.", rich_help_panel=_RUN),
]
NumPrefill = Annotated[int, typer.Option("--prefill", min=0, help="Prefill workers.", rich_help_panel=_RUN)]
NumDecode = Annotated[int, typer.Option("--decode", min=1, help="Decode workers.", rich_help_panel=_RUN)]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads per worker; by default they share the cores.", show_default=False, rich_help_panel=_RUN
    ),
]
Pin = Annotated[
    bool | None,
    typer.Option(
        "--pin/--no-pin",
        help="Cores of its own for each worker's threads; by default where one core is left over.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
KvMemory = Annotated[
    str | None,
    typer.Option(help="KV pool of each worker, such as 512MiB.", show_default=False, rich_help_panel=_RUN),
]
ApiKeys = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="File of API keys (kvferry key makes it); without, everybody who reaches a port may ask.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
ServeTls = Annotated[
    Path | None,
    typer.Option(
        "--tls",
        exists=True,
        file_okay=False,
        help="Folder of certificates (kvferry certs init makes it): services then let in nobody but each other.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Let the gateway listen beyond this machine without TLS: keys and prompts travel in the clear.",
        rich_help_panel=_RUN,
    ),
]
HostKvMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory of each worker for blocks that its pool evicts.", show_default=False, rich_help_panel=_RUN
    ),
]
LogDir = Annotated[
    Path | None,
    typer.Option(help="Where the processes log; build/logs in the clone by default.", show_default=False,
                 rich_help_panel=_RUN),
]  # fmt: skip
Level = Annotated[LogLevel, typer.Option("--log-level", help="How much they log.", rich_help_panel=_RUN)]


def client_tls(ca: Path | None) -> TlsConfig | None:
    return None if ca is None else TlsConfig(root_certificates=ca)
