from __future__ import annotations

from typing import Any

import pytest

from kvferry import errors
from services.engine.chat import ChatTemplate
from services.engine.model_files import ModelFiles

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&amp;</b> \"'"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1\n"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
]


def template(source: str | None, **special: str) -> ChatTemplate:
    return ChatTemplate(source, model="tiny", special_tokens=special)


@pytest.mark.parametrize("messages", CHATS)
def test_smollm2_renders_and_encodes_as_transformers_does(messages: list[dict[str, str]], smollm2: ModelFiles,
                                                          reference_tokenizer: Any) -> None:  # fmt: skip
    text = smollm2.chat_template.render(messages)
    assert text == reference_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = reference_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2.tokenizer.encode(text, add_special=False) == ids


def test_templates_see_special_tokens_and_helpers() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "  {%- if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{{ {'é': m.content} | tojson }}{% generation %}!{% endgeneration %}\n"
        "{% endfor %}{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}{{ tools is none }}"
    )
    rendered = template(source, bos_token="<s>").render([{"role": "skip", "content": ""}, *CHATS[0]])
    assert rendered == '<s>{"é": "Hi"}!4TrueTrue'


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(errors.InvalidRequestError, match="roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(CHATS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content.strip() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_cannot_do_is_the_requests_error(source: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match="messages"):
        template(source).render(CHATS[0])


def test_without_a_template_chat_is_refused() -> None:
    with pytest.raises(errors.InvalidRequestError, match="tiny has no chat template"):
        template(None).render(CHATS[0])


def test_a_broken_template_is_told_when_it_is_needed() -> None:
    broken = template("{% if %}")
    with pytest.raises(errors.InvalidRequestError, match="is broken"):
        broken.render(CHATS[0])
