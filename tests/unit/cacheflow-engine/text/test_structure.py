"""What structured output takes, and that nothing a client can send as one is more than an `InvalidRequestError`."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import msgspec
import pytest

from cacheflow.errors import InvalidRequestError
from cacheflow.text.structure import check_structure
from cacheflow.types import MAX_SCHEMA_DEPTH, SamplingParams, StructuredOutput

GOOD: list[dict[str, Any]] = [
    {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    {"json_schema": '{"enum": ["a", 1, null]}'},
    {"regex": r"(a+)+b"},
    {"grammar": 'start: "a" start | "b"'},
    {"choices": ['say "no"', "ünïcode\n", "\\"]},
    {"json_object": True},
]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("values", GOOD, ids=lambda values: next(iter(values)))
def test_each_kind_is_accepted(values: dict[str, Any]) -> None:
    check_structure(StructuredOutput(**values))


@pytest.mark.parametrize("values", GOOD, ids=lambda values: next(iter(values)))
def test_each_kind_travels_to_the_engine(values: dict[str, Any]) -> None:
    params = SamplingParams(structured=StructuredOutput(**values))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_the_fields_by_name_are_taken_too() -> None:
    values: Any = {"choices": ["a", "b"]}
    assert SamplingParams(structured=values).structured == StructuredOutput(choices=("a", "b"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"regex": "a", "choices": ["a"]},
        {"json_object": False},
        {"json_object": 1},
        {"json_schema": "{"},
        {"json_schema": "[]"},
        {"json_schema": 5},
        {"json_schema": "[" * 60_000},
        {"json_schema": {"enum": ["x" * 70_000]}},
        {"json_schema": {"const": float("nan")}},
        {"json_schema": nested(MAX_SCHEMA_DEPTH + 1)},
        {"regex": ""},
        {"regex": "a" * 9000},
        {"regex": "\ud800"},
        {"grammar": "x" * 70_000},
        {"choices": []},
        {"choices": ["a"] * 1025},
        {"choices": ["a", ""]},
        {"choices": ["a", 1]},
        {"choices": "ab"},
        {"choices": ["x" * 40_000, "y" * 40_000]},
    ],
    ids=lambda values: json.dumps(values)[:30],
)
def test_what_is_too_much_or_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        StructuredOutput(**values)


def test_unknown_fields_are_refused() -> None:
    values: Any = {"json_shema": {}}
    with pytest.raises(InvalidRequestError, match="json_schema, regex, grammar, choices, json_object"):
        SamplingParams(structured=values)


def many_states(count: int) -> str:
    return "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(count)) + f'\nA{count}: "x"'


@pytest.mark.parametrize(
    "values",
    [
        {"json_schema": {"type": "nope"}},
        {"json_schema": {"$ref": "#/nowhere"}},
        {"json_schema": {"$ref": "http://localhost/schema"}},
        {"json_schema": {"type": "string", "pattern": "("}},
        {"regex": "("},
        {"regex": "(?=a)b"},
        {"regex": r"(a)\1"},
        {"regex": "(" * 4000 + ")" * 4000},
        {"grammar": "start: nowhere"},
        {"grammar": "not a grammar"},
        {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
        {"grammar": many_states(40)},
    ],
    ids=lambda values: json.dumps(values)[:40],
)
def test_what_is_no_grammar_or_too_large_a_one_is_refused_with_its_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_structure(StructuredOutput(**values))
    assert caught.value.param == next(iter(values))


@pytest.mark.parametrize(
    "values", [{"regex": "(a|a)*(a|aa)+$"}, {"regex": "((((a{1,99}){1,99}){1,99}){1,99})"}, {"regex": "(.*){9}x"}]
)
def test_patterns_that_make_backtracking_engines_hang_are_decided(values: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequestError):
        check_structure(StructuredOutput(**values))


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"cacheflow-engine\[structured\]") as caught:
        check_structure(StructuredOutput(regex="a"))
    assert caught.value.param == "structured"
