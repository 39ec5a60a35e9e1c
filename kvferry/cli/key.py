"""kvferry key: a new API key for a tenant."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli import output

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def key(
    tenant: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, '.', '_' and '-'.")],
    file: Annotated[
        Path | None,
        typer.Option(help="Append the entry to this file, which is made where it is missing.", show_default=False),
    ] = None,
) -> None:
    """Make an API key, and the entry for the gateway's file of keys (--api-keys).

    The key is printed once, on stdout; the file holds only its SHA-256. Each tenant has a prefix cache of its own, so none
    can tell by the time of an answer what another has asked. Tenants that trust each other may share one: a table
    [tenant.NAME] with cache = "NAME-OF-THE-CACHE" for each of them. A running gateway takes over a changed file within
    seconds; deleting an entry ends a key.

    \b
    Examples:
      kvferry key search --file keys.toml
      kvferry serve --api-keys keys.toml
      KVFERRY_API_KEY=kvf-... kvferry generate "Hello"
    """
    if not _TENANT.fullmatch(tenant):
        raise typer.BadParameter("1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit")
    text = f"kvf-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    today = datetime.datetime.now(datetime.UTC).date()
    entry = f'[[key]]  # made {today}\ntenant = "{tenant}"\nsha256 = "{digest}"\n'
    if file is None:
        output.say(entry)
    else:
        try:
            # For its owner alone, where it is new: names of tenants are nobody else's business.
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as entries:
                entries.write(entry if entries.tell() == 0 else f"\n{entry}")
        except OSError as error:
            output.fail(f"{file}: {error.strerror}")
    print(text)
