"""Reads single fields of a request's JSON, and names the one that is at fault. It knows no endpoint.

A null stands for the default everywhere: `given` drops it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from cacheflow.errors import InvalidRequestError, shown
from cacheflow.types import MAX_STOP_LENGTH, MAX_STRUCTURE_BYTES, SAMPLING_FIELDS, StructuredOutput

MAX_STOP_STRINGS = 4
"""OpenAI's limit."""
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
"""OpenAI's limits."""
MAX_SCHEMA_BYTES = MAX_STRUCTURE_BYTES
"""Longest JSON schema of a response format or a tool."""

_STRUCTURE_PARAMS = ("structured", *(field.name for field in fields(StructuredOutput)))


def given(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are there and not null."""
    return {name: value for name, value in document.items() if value is not None}


def ignored(document: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The names that mean nothing to an endpoint that reads `known` and the sampling parameters."""
    return [name for name in document if name not in known and name not in SAMPLING_FIELDS]


def must_be(name: str, allowed: str, value: Any) -> InvalidRequestError:
    """The error that says what a field must be, and what it is."""
    return InvalidRequestError(f"{name} must be {allowed}, got {shown(value)}.", param=name)


def flag(values: Mapping[str, Any], name: str, default: bool = False, place: str = "") -> bool:
    """A field that is true or false.

    Args:
        values: The fields.
        name: Of this one.
        default: If it is left out.
        place: As in `choice`.

    Raises:
        InvalidRequestError: It is neither.
    """
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise must_be(f"{place}{name}", "true or false", value)
    return value


def string(values: Mapping[str, Any], name: str, place: str = "") -> str | None:
    """A field that is text, or None.

    Args:
        values: The fields.
        name: Of this one.
        place: As in `choice`.

    Raises:
        InvalidRequestError: It is something else.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise must_be(f"{place}{name}", "a string", value)
    return value


def whole(values: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    """A field that is a whole number from `low` to `high`, or None.

    Raises:
        InvalidRequestError: It is something else.
    """
    value = values.get(name)
    # `type`, because a bool is an int too.
    if value is not None and (type(value) is not int or value < low or (high is not None and value > high)):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise must_be(name, f"a whole number {allowed}", value)
    return value


def choice(values: Mapping[str, Any], name: str, allowed: Collection[str], default: str, place: str = "") -> str:
    """A field that is one of a few words.

    Args:
        values: The fields.
        name: Of this one.
        allowed: The words.
        default: If it is left out.
        place: What stands before the name if `values` are not those of the whole request, such as "messages[0].".

    Raises:
        InvalidRequestError: It is something else.
    """
    value = values.get(name, default)
    if not isinstance(value, str) or value not in allowed:
        raise must_be(f"{place}{name}", f"one of {', '.join(allowed)}", value)
    return value


def texts_or_ids(values: Mapping[str, Any], name: str, most: int) -> list[str | list[int]]:
    """A field that is a text, a list of token ids, or a list of either: always as a list of them.

    Raises:
        InvalidRequestError: It is something else, is missing, or has more than `most` entries.
    """
    value = values.get(name)
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) or is_ids(entry) for entry in value):
        raise must_be(name, "a string, a list of token ids, or a list of either", value)
    if len(value) > most:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries; at most {most} go into one request. Send several.", param=name
        )
    return value


def is_ids(value: Any) -> bool:
    """Whether it is a list of whole numbers."""
    return isinstance(value, list) and all(type(i) is int for i in value)


def mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that is a JSON object; empty if it is left out.

    Raises:
        InvalidRequestError: It is something else.
    """
    value = values.get(name, {})
    if not isinstance(value, dict):
        raise must_be(name, "an object", value)
    return value


def include_usage(values: Mapping[str, Any], stream: bool) -> bool:
    """Whether `stream_options` asks for the token counts at a stream's end.

    Raises:
        InvalidRequestError: It is no such object, or there is no stream.
    """
    options = mapping(values, "stream_options")
    if options and not stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")
    return flag(given(options), "include_usage", place="stream_options.")


def check_stop(values: Mapping[str, Any]) -> None:
    """Holds `stop` to OpenAI's limit, which is lower than that of the sampling parameters.

    Raises:
        InvalidRequestError: It is something else than a few short strings.
    """
    stop = values.get("stop", [])
    strings = [stop] if isinstance(stop, str) else stop
    are_short = isinstance(strings, list) and all(isinstance(s, str) and 1 <= len(s) <= MAX_STOP_LENGTH for s in strings)
    if not are_short or len(strings) > MAX_STOP_STRINGS:
        raise must_be("stop", f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters", stop)


def sampling_fields(values: Mapping[str, Any], left_out: Collection[str] = ()) -> dict[str, Any]:
    """Those of the fields that are sampling parameters. OpenAI's seeds may be negative: each stands for one of the engine's.

    Raises:
        InvalidRequestError: The seed is none.
    """
    sampling = {name: value for name, value in values.items() if name in SAMPLING_FIELDS and name not in left_out}
    seed = whole(sampling, "seed", MIN_SEED, MAX_SEED)
    if seed is not None and seed < 0:
        sampling["seed"] = seed - MIN_SEED
    return sampling


@contextmanager
def structure_errors_named(param: str | None) -> Iterator[None]:
    """What is found wrong with a structured output inside is told of the field `param` that it was made from, if that is given.

    Raises:
        InvalidRequestError: The same, under that name.
    """
    try:
        yield
    except InvalidRequestError as error:
        if param is None or error.param not in _STRUCTURE_PARAMS:
            raise
        raise InvalidRequestError(str(error), param=param) from error


def schema(value: Any, param: str) -> dict[str, Any]:
    """A JSON schema, of which only the size is checked here; what it says is the engine's to refuse.

    Raises:
        InvalidRequestError: It is no object, or too long.
    """
    if not isinstance(value, dict):
        raise must_be(param, "a JSON schema, which is an object", value)
    num_bytes = len(json.dumps(value).encode())
    if num_bytes > MAX_SCHEMA_BYTES:
        raise InvalidRequestError(
            f"{param} is {num_bytes} bytes long; a schema may have at most {MAX_SCHEMA_BYTES}. Send a simpler one.", param=param
        )
    return value
