"""The command line, ``kvferry``.  Importing ``kvferry`` does not import this."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvferry._version import __version__
from kvferry.cli import certs
from kvferry.cli.bench import bench
from kvferry.cli.calibrate import calibrate
from kvferry.cli.chat import chat
from kvferry.cli.demo import demo
from kvferry.cli.doctor import doctor
from kvferry.cli.drain import drain
from kvferry.cli.explain import explain
from kvferry.cli.generate import generate
from kvferry.cli.key import key
from kvferry.cli.plan import plan
from kvferry.cli.role import role
from kvferry.cli.scale import scale
from kvferry.cli.serve import serve
from kvferry.cli.status import status


def _version(asked: bool) -> None:
    if asked:
        print(f"kvferry {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Serve a language model with prefill and decode split, and talk to it.

    \b
    Try it:
      kvferry demo               a cluster, one answer, its timeline
      kvferry serve              a cluster that stays
      kvferry chat               talk to it, from another terminal
      kvferry status --watch     see what it does
      kvferry explain ID         why a request went where it did
      kvferry bench              put load on it, and see what its clients would feel
      kvferry plan TRACE         whether to split for your traffic, and into what
      kvferry calibrate          how long steps take here, for plans
      kvferry drain WORKER       let a worker finish what it has, before it is ended
      kvferry role WORKER decode the same, and it goes on in that role
      kvferry scale prefill=2    more or fewer workers of a kvferry serve
      kvferry doctor             what this host gives, and what to change
      kvferry key TENANT         an API key, for a gateway that wants them
      kvferry certs init DIR     certificates, for services that do not share a machine

    The gateway to talk to is --address, or KVFERRY_ADDRESS, or 127.0.0.1:8470. Exit codes: 0 fine, 1 failed, 2 wrong
    usage, 130 interrupted.
    """


def make_app(*, rich: bool) -> typer.Typer:
    """``rich`` frames and colours the help."""
    app = typer.Typer(
        name="kvferry",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown" if rich else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in (
        demo,
        serve,
        generate,
        chat,
        status,
        explain,
        bench,
        plan,
        calibrate,
        drain,
        role,
        scale,
        doctor,
        key,
    ):
        app.command()(command)
    app.add_typer(certs.app, name="certs")
    return app


def main() -> None:
    make_app(rich=sys.stdout.isatty())()
