"""Tool calls in a growing text: found whole, told early, and the same however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow_openai.tool_calls import ToolCallParser

HERMES = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}}\n</tool_call>'


def parse(parts: list[str], is_marked: bool = True, max_calls: int = 16) -> tuple[str, list[tuple[str | None, str]]]:
    """The content, and the name and arguments of each call."""
    parser = ToolCallParser(is_marked, max_calls)
    content = ""
    calls: list[tuple[str | None, str]] = []
    for parsed in [*map(parser.feed, parts), parser.finish()]:
        content += parsed.content
        for call in parsed.calls:
            if call.id is not None:
                assert call.index == len(calls)
                assert call.id.startswith("call_")
                calls.append((call.name, ""))
            assert call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    return content, calls


@pytest.mark.parametrize(
    ("text", "is_marked", "content", "calls"),
    [
        (HERMES, True, "Let me look.", [("weather", '{"city": "Paris", "days": [1, 2]}')]),
        ('<tool_call>{"name":"a","arguments":{}}</tool_call>\n<tool_call>{"name":"b","arguments":{"x":1} }</tool_call>\n',
         True, "", [("a", "{}"), ("b", '{"x":1}')]),
        ('<tool_call>[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]</tool_call>',
         True, "", [("a", "{}"), ("b", "{}")]),
        ('<tool_call>{"name": "a", "arguments": {}}</tool_call>\n\nDone.', True, "Done.", [("a", "{}")]),
        ('{"name": "a", "parameters": {"x": "}\\"{"}}', False, "", [("a", '{"x": "}\\"{"}')]),
        ('{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', False, "", [("a", "{}"), ("b", "{}")]),
        (' [{"name": "a", "arguments": {}}]', False, "", [("a", "{}")]),
        ('{"arguments": {"x": 1}, "name": "a"}', False, "", [("a", '{"x": 1}')]),
        ('{"name": "a", "arguments": "{\\"x\\": 1}"}', False, "", [("a", '{"x": 1}')]),
        ('{"name": "a"}', False, "", [("a", "{}")]),
        ('{"type": "function", "name": "a", "parameters": {}}', False, "", [("a", "{}")]),
    ],
)  # fmt: skip
def test_calls_are_found(text: str, is_marked: bool, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse([text], is_marked) == (content, calls)


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "", " \n", "Hello.", "a < b <tool", "<tool_call>", "<tool_call>no", '<tool_call>{"x": 1}</tool_call>', '{"answer": 42}',
        "[1, 2, 3]", '{"name": 1}', "{", '{"name": "a', "</tool_call>", "<tool_call>\n</tool_", "words \n\n", "😀",
    ],
)  # fmt: skip
def test_what_is_no_call_is_content_to_the_letter(text: str, is_marked: bool) -> None:
    assert parse([text], is_marked) == (text, [])


def test_a_call_that_is_cut_off_keeps_what_was_told_of_it() -> None:
    assert parse([HERMES[:70]]) == ("Let me look.", [("weather", '{"city": "Pa')])


def test_arguments_are_told_while_they_grow() -> None:
    parser = ToolCallParser(is_marked=False, max_calls=1)
    assert parser.feed('{"name": "a", "arg').calls[0].name == "a"
    assert [call.arguments for call in parser.feed('uments": {"x": ').calls] == ['{"x": ']
    assert [call.arguments for call in parser.feed("12").calls] == ["12"]


@pytest.mark.parametrize("end", [0, 1, 20])
def test_calls_beyond_the_limit_are_dropped(end: int) -> None:
    text = '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]'
    assert parse([text[: len(text) - end]], is_marked=False, max_calls=1) == ("", [("a", "{}")])


TEXTS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<tool", "_call>", "\n", " ", "{", "}", "[", "]", ",", ":", '"', "\\", "é", "words"]
        + ['{"name": "a", "arguments": {"x": [1, "}"]}}', '"name"', '"arguments"', '{"name": "b"', HERMES]
    ),
    max_size=12,
).map("".join)


@given(TEXTS, st.booleans(), st.integers(1, 3), st.data())
def test_the_parts_of_a_text_give_the_same_as_the_text(text: str, is_marked: bool, max_calls: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(parts, is_marked, max_calls) == parse([text], is_marked, max_calls)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v))
)
def test_any_arguments_come_out_as_they_were(value: object) -> None:
    arguments = json.dumps({"value": value}, ensure_ascii=False)
    assert parse([f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>']) == ("", [("f", arguments)])
