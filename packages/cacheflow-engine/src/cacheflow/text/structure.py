"""A `StructuredOutput` as a grammar of llguidance, and whether that is one: what both sides of the engine need of it.

It knows the library's limits and no tokens; masks are `sampling.structured`'s. The library is imported on first use.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cacheflow.errors import InvalidRequestError
from cacheflow.types import StructuredOutput

if TYPE_CHECKING:
    from types import ModuleType

INSTALL = "pip install 'cacheflow-engine[structured]'"
MAX_GRAMMAR_DEPTH = 64
"""Brackets within each other in a regular expression or a grammar, whose parser calls itself for each."""
WHITESPACE = r"[ \n\t]{0,20}"
"""Between the tokens of JSON. A bound, because small models like to go on with spaces for ever."""

_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}


def load_library() -> ModuleType:
    """The library, llguidance.

    Raises:
        InvalidRequestError: It is not installed, with how to.
    """
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequestError(
            f"Structured output needs llguidance, which can't be imported ({error}). Install it beside the engine and the "
            f"frontend: {INSTALL}",
            param="structured",
        ) from error
    return llguidance


def limits() -> Any:
    """What compiling a grammar and a step of it may cost, in the library's units.

    `initial_lexer_fuel` is a tenth of the default: `((a{1000}){1000}){1000}` fails in its second step either way, but held up
    everybody's first one for 1.0 s and does so for 0.03 s now (on an Intel Xeon), while none of 17 large forms (900 choices
    of 60 characters, an enum of 2,000, patterns up to `.{0,2000}`) needs even half as much.
    """
    return load_library().LLParserLimits(max_lexer_states=50_000, initial_lexer_fuel=100_000, verbose_errors=False)


def grammar_of(structure: StructuredOutput) -> str:
    """In the library's own format; not yet compiled.

    Raises:
        InvalidRequestError: The library is missing, or refuses it at sight.
    """
    matcher = load_library().LLMatcher
    for name in ("regex", "grammar"):
        _check_depth(name, getattr(structure, name) or "")
    try:
        if structure.regex is not None:
            grammar = matcher.grammar_from_regex(structure.regex)
        elif structure.grammar is not None:
            grammar = matcher.grammar_from_lark(structure.grammar)
        elif structure.choices is not None:
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in structure.choices)
            grammar = matcher.grammar_from_lark(f"start: {choices}")
        else:
            schema = '{"type": "object"}' if structure.json_object else structure.json_schema
            grammar = matcher.grammar_from_json_schema(schema, defaults=_JSON_OPTIONS)
    except ValueError as error:
        raise refusal(structure, str(error)) from error
    return str(grammar)


def check_structure(structure: StructuredOutput) -> None:
    """Compiles it once, for no tokenizer. Takes milliseconds, seconds at most; the interpreter's lock is free meanwhile.

    Raises:
        InvalidRequestError: The library is missing or refuses it, with its reason.
    """
    error = load_library().LLMatcher.validate_grammar(grammar_of(structure), None, limits=limits())
    if error and not error.startswith("WARNING"):
        raise refusal(structure, error)


def refusal(structure: StructuredOutput, reason: str) -> InvalidRequestError:
    """The error that says that this structure can't be had."""
    name = kind_of(structure)
    if reason.startswith("NoExtension"):  # So the library says that it has come to where nothing can follow.
        reason = "no text fits it, or none goes on from what has been generated"
    return InvalidRequestError(f"{name} can't be used: {' '.join(reason.split())[:500]}", param=name)


def kind_of(structure: StructuredOutput) -> str:
    """Which of its fields is given."""
    names = ("json_schema", "regex", "grammar", "choices")
    return next((name for name in names if getattr(structure, name) is not None), "json_object")


def _check_depth(name: str, text: str) -> None:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_GRAMMAR_DEPTH:
        raise InvalidRequestError(
            f"{name} has {deepest} brackets within each other; at most {MAX_GRAMMAR_DEPTH} are taken.", param=name
        )
