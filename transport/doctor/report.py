"""The examination from one end to the other, and how it is told."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transport.doctor.advice import Finding, Level, judge
from transport.doctor.facts import Facts
from transport.doctor.host import look_at_host
from transport.doctor.trial import Work, try_out, work_for
from transport.doctor.ucx import look_at_ucx

_MARKS = {Level.OK: "ok", Level.NOTE: "--", Level.WARNING: "!!", Level.BROKEN: "XX"}


@dataclass(frozen=True, slots=True)
class Report:
    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> bool:
        return any(finding.level is Level.BROKEN for finding in self.findings)

    def as_json(self) -> str:
        """One document: facts, findings, and whether anything is broken."""

        def plain(item: object) -> Any:
            if isinstance(item, Enum):
                return item.name.lower()
            raise TypeError(f"{type(item).__name__} has no JSON form")

        return json.dumps({**dataclasses.asdict(self), "broken": self.broken}, default=plain)

    def as_text(self) -> str:
        lines: list[str] = []
        section = ""
        for finding in self.findings:
            if finding.section != section:
                section = finding.section
                lines.append(section)
            lines.append(f"  {_MARKS[finding.level]} {finding.text}")
        changes = [finding.change for finding in self.findings if finding.change]
        return "\n".join([*lines, "What to change", *(f"  {change}" for change in changes or ["nothing"])])


def examine(tell: Callable[[str], None], work: Work | None = None) -> Report:
    """``tell`` hears what is being done.  ``work`` is what fits this host unless given; without seconds nothing is
    measured.  Blocks for seconds, a few minutes at worst."""
    tell("looking at this host")
    host = look_at_host(os.environ)
    work = work or work_for(host.available_nbytes)
    try:
        ucx = look_at_ucx()
    except FileNotFoundError as e:
        facts = Facts(host, None, str(e), ())
    else:
        trials = [try_out("default", {}, work, tell)]
        if work.seconds and trials[0].ucx_version:
            trials.append(try_out("tcp", {"UCX_TLS": "tcp,self"}, work, tell))
        facts = Facts(host, ucx, "", tuple(trials))
    return Report(facts, judge(facts))
