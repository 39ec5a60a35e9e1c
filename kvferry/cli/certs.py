"""kvferry certs: certificates for the services of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvferry._roles import CertificateRole
from kvferry.cli import output

DEFAULT_DAYS = 90
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


_Days = Annotated[int, typer.Option(min=1, max=825, help="How long they are valid.")]
_Folder = Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="The authority's folder.")]

app = typer.Typer(no_args_is_help=True)


@app.callback()
def certs() -> None:
    """Make certificates for a cluster's services, with an authority of the cluster's own.

    A certificate names its holder's role: gateway, worker, directory or operator. Services are let in, and trusted, as
    that, wherever they run. Needs the package cryptography: pip install 'kvferry[tls]'.

    \b
    Examples:
      kvferry certs init certs
      kvferry serve --tls certs
      kvferry certs issue certs gateway --host llm.example.org
    """


@app.command()
def init(folder: _Folder, days: _Days = DEFAULT_DAYS) -> None:
    """Make an authority and one certificate of each role, for a cluster on this machine.

    Keep ca.key where no service runs: who has it can be anything. The authority is valid for ten years.
    """
    _make(folder, list(CertificateRole), LOCAL_HOSTS, None, days, new=True)
    output.say(f"made an authority in {folder}, and a certificate of each role; next: kvferry serve --tls {folder}")


@app.command()
def issue(
    folder: _Folder,
    role: Annotated[CertificateRole, typer.Argument(help="What its holder may be.", show_default=False)],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address that clients reach a gateway by; may be given again.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the files; the role by default.", metavar="NAME", show_default=False)
    ] = None,
    days: _Days = DEFAULT_DAYS,
) -> None:
    """Make a certificate, or replace it: running services take over the new files within seconds."""
    _make(folder, [role], tuple(host or LOCAL_HOSTS), name, days, new=False)
    output.say(f"made {folder / (name or role.value)}.pem and .key")


def _make(
    folder: Path, roles: list[CertificateRole], hosts: tuple[str, ...], name: str | None, days: int, *, new: bool
) -> None:
    try:
        from kvferry.cli import authority
    except ImportError as error:
        output.fail(f"certificates need cryptography ({error}); pip install 'kvferry[tls]'")
    try:
        if new:
            authority.create(folder)
        for role in roles:
            is_door = role is CertificateRole.GATEWAY
            authority.issue(
                folder, name or role.value, dns_names=[role.dns_name], hosts=hosts if is_door else (), days=days
            )
    except authority.AuthorityError as error:
        output.fail(str(error))
    except OSError as error:
        output.fail(f"{error.filename}: {error.strerror}")
