"""Chat templates: the text that a model was trained to see for a conversation.  No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kvferry import errors


class ChatTemplate:
    """A model's template, compiled in Jinja's sandbox: it comes with the weights, so it is not trusted.  ``source`` None
    is a model without one; rendering then raises.  ``special_tokens``: what templates call ``bos_token``, ``eos_token``
    and so on.  Thread-safe."""

    def __init__(self, source: str | None, *, model: str, special_tokens: Mapping[str, str]) -> None:
        self._model = model
        self._special_tokens = dict(special_tokens)
        self._template: jinja2.Template | None = None
        self._broken: str | None = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as error:  # the model still serves raw prompts
                self._broken = str(error)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for ``messages`` (each with ``role`` and ``content``) up to where the assistant's answer begins.  The
        text has its beginning-of-sequence token already if the model wants one.  Raises InvalidRequestError when the
        model has no template, or its template does not take this conversation."""
        if self._broken is not None:
            raise errors.InvalidRequestError(
                f"the chat template of {self._model} is broken ({self._broken}); send a plain prompt instead"
            )
        if self._template is None:
            raise errors.InvalidRequestError(
                f"the model {self._model} has no chat template; send a plain prompt instead", reason="NO_CHAT_TEMPLATE"
            )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise errors.InvalidRequestError(f"messages: {error.message or type(error).__name__}") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise errors.InvalidRequestError(
                f"messages: the chat template of {self._model} does not take them: {error}"
            ) from error


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; here only its contents count."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    # Jinja's own escapes for HTML, which prompts are not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
