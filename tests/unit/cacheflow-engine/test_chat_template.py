"""Chat templates: what they are given, and what a hostile one can't do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cacheflow.errors import CheckpointError, InvalidRequestError
from cacheflow.text.chat_template import ChatTemplate
from cacheflow.types import TokenizerData

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}


def template(source: str | None, **limits: Any) -> ChatTemplate:
    data = TokenizerData(tokenizer_json="{}", chat_template=source, special_tokens={"bos_token": "<s>"})
    return ChatTemplate(data, **limits)


def refusal(source: str | None, messages: list[dict[str, Any]] | None = None, **limits: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        template(source, **limits).render(HELLO if messages is None else messages)
    assert caught.value.param == "messages"
    return caught.value


def test_the_demo_models_template_writes_a_conversation_up_to_the_answer() -> None:
    assert template(SMOLLM2).render(HELLO) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_says_itself_whether_it_knows_tools() -> None:
    assert not template(SMOLLM2).has_tools
    assert not template(None).has_tools
    assert template("{% if tools %}{{ tools | tojson }}{% endif %}").has_tools


def test_json_is_written_plainly() -> None:
    text = template("{{ tools | tojson(indent=2) }}").render(HELLO, [TOOL])
    assert json.loads(text) == [TOOL]
    assert "<é>" in text


def test_special_tokens_and_variables_are_there() -> None:
    rendered = template("{{ bos_token }}{{ enable_thinking }}").render(
        HELLO, variables={"enable_thinking": True, "bos_token": "x"}
    )
    assert rendered == "<s>True"


def test_what_templates_on_the_hub_use_is_there() -> None:
    source = (
        "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert template(source).render(HELLO * 2) == "Hello4"


def test_a_template_may_refuse_messages_in_its_own_words() -> None:
    assert "roles must alternate" in str(refusal("{{ raise_exception('roles must alternate') }}"))


def test_what_a_template_makes_of_strange_messages_is_the_requests_fault() -> None:
    assert "chat template" in str(refusal(SMOLLM2, [{"role": "user"}]))


def test_without_a_template_messages_are_refused() -> None:
    assert "no chat template" in str(refusal(None))


def test_a_template_that_is_no_jinja_is_the_models_fault() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        template("{% for %}").render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_reaches_nothing_and_changes_nothing(source: str) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    try:
        rendered = template(source).render(messages)
    except InvalidRequestError:
        rendered = ""
    assert rendered == ""
    assert messages == HELLO


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].role }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_takes_too_long_is_ended(source: str) -> None:
    assert refusal(source, timeout_s=0.02)


@pytest.mark.parametrize(
    "source", ["{% for i in range(99999) %}{{ '1234567890' }}{% endfor %}", "{{ 'a' * 10000 }}", "{{ 10000 * 'a' }}"]
)
def test_a_text_that_grows_too_long_is_ended(source: str) -> None:
    assert "more than 1000 characters" in str(refusal(source, max_chars=1000))


def test_a_huge_power_is_not_computed() -> None:
    assert "power" in str(refusal("{{ 9 ** 9 ** 9 }}"))
