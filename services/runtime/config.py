"""One frozen dataclass per service, filled once: flags over environment over file over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field that ``load`` fills.  Without a default the option must be given.  Numbers outside
    [minimum, maximum] are rejected; cross-field rules belong in ``__post_init__``, as ValueError."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


def load(cls: type[T], argv: Sequence[str], prog: str, environ: Mapping[str, str] | None = None) -> T:
    """Builds ``cls`` from flags, else KVFERRY_<FIELD>, else the TOML file that --config names, else the defaults.

    Field types: bool, int, float, str, pathlib.Path, Enum (by value), tuple[str, ...], and any of these or None.
    Flags and keys of the file that ``cls`` does not know are rejected; environment variables of other services are not,
    since services share one environment.  Anything wrong ends the process with status 2 and one sentence on stderr;
    --help ends it with status 0.
    """
    assert dataclasses.is_dataclass(cls)
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    parser = _Parser(prog=prog, description=_summary(cls), allow_abbrev=False, formatter_class=_Formatter)
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with any of these options, written as in some_option"
    )
    for name, field in fields.items():
        _add_flag(parser, field, hints[name])
    flags = vars(parser.parse_args(argv))
    try:
        file = _read_file(Path(flags["config"]), fields) if flags["config"] is not None else {}
        values = {}
        for name, field in fields.items():
            variable = f"KVFERRY_{name.upper()}"
            if (flag := flags[name]) is not None:
                raw, source = flag, _flag(name)
            elif variable in environ:
                raw, source = environ[variable], variable
            elif name in file:
                raw, source = file[name], f"{name} in {flags['config']}"
            elif field.default is not dataclasses.MISSING:
                continue
            else:
                raise _Rejected(f"{_flag(name)} is required; give the flag, {variable}, or {name} in the --config file")
            values[name] = _convert(raw, hints[name], field, source)
        return cls(**values)
    except (_Rejected, ValueError) as error:
        parser.error(str(error))


class _Rejected(Exception):
    """The message is for the operator."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    kind = _kind(hint)
    text = f"{field.metadata['help']} [{_default_text(field)}; KVFERRY_{field.name.upper()}]".replace("%", "%%")
    common: dict[str, Any] = {"dest": field.name, "default": None, "help": text}
    if kind is bool:
        parser.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, **common)
    elif _is_tuple(kind):
        parser.add_argument(_flag(field.name), action="append", metavar="A,B", **common)
    elif issubclass(kind, Enum):
        parser.add_argument(_flag(field.name), metavar="|".join(str(member.value) for member in kind), **common)
    else:
        names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
        parser.add_argument(_flag(field.name), metavar=names[kind], **common)


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        return "required"
    if isinstance(default, Enum):
        default = default.value
    elif isinstance(default, tuple):
        default = ",".join(default)
    elif isinstance(default, bool):
        default = "on" if default else "off"
    return "unset" if default is None or default == "" else str(default)


def _read_file(path: Path, fields: Mapping[str, object]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _Rejected(f"cannot read the --config file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # tomllib passes on what int() and deep nesting raise
        raise _Rejected(f"the --config file {path} is not valid TOML: {error}") from error
    for key in content:
        if key not in fields:
            raise _Rejected(f"unknown key {key} in {path}; known are {', '.join(sorted(fields))}")
    return content


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _kind(hint: Any) -> Any:
    """The type without its "or None"."""
    if not _is_optional(hint):
        return hint
    (kind,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return kind


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _convert(raw: Any, hint: Any, field: dataclasses.Field[Any], source: str) -> Any:
    """``raw`` is a string (flag, environment), a list of strings (repeated flag), a bool (flag) or a TOML value."""
    kind = _kind(hint)
    if _is_optional(hint) and isinstance(raw, str) and raw.lower() in ("", "none"):
        return None
    if _is_tuple(kind):
        return _strings(raw, source)
    if kind is bool:
        return _boolean(raw, source)
    if kind is str or kind is Path:
        if not isinstance(raw, str):
            raise _Rejected(f"{source} must be text, not {raw!r}")
        return kind(raw)
    if issubclass(kind, Enum):
        for member in kind:
            if str(member.value) == str(raw):
                return member
        raise _Rejected(f"{source} must be one of {', '.join(str(m.value) for m in kind)}, not {raw!r}")
    return _number(raw, kind, field, source)


def _strings(raw: Any, source: str) -> tuple[str, ...]:
    parts = [raw] if isinstance(raw, str) else raw
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise _Rejected(f"{source} must be a list of texts, not {raw!r}")
    return tuple(item.strip() for part in parts for item in part.split(",") if item.strip())


def _boolean(raw: Any, source: str) -> bool:
    if isinstance(raw, bool):
        return raw
    word = raw.lower() if isinstance(raw, str) else None
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise _Rejected(f"{source} must be true or false, not {raw!r}")


def _number(raw: Any, kind: type[int] | type[float], field: dataclasses.Field[Any], source: str) -> int | float:
    name = "a whole number" if kind is int else "a number"
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)) or (kind is int and isinstance(raw, float)):
        raise _Rejected(f"{source} must be {name}, not {raw!r}")
    try:
        value = kind(raw)
    except ValueError as error:
        raise _Rejected(f"{source} must be {name}, not {raw!r}") from error
    if value != value:
        raise _Rejected(f"{source} must be a number, not {raw!r}")
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    if minimum is not None and value < minimum:
        raise _Rejected(f"{source} must be at least {minimum}, not {raw}")
    if maximum is not None and value > maximum:
        raise _Rejected(f"{source} must be at most {maximum}, not {raw}")
    return value
