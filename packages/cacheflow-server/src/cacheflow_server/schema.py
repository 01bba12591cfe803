"""What `POST /generate` accepts. A null stands for the default. It knows no HTTP and no engine."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from cacheflow.asgi import sampling_params
from cacheflow.errors import InvalidRequestError, shown
from cacheflow.types import SAMPLING_FIELDS, SamplingParams, sampling_texts

LOST_FIELDS = ("prompt_logprobs",)
"""Sampling parameters whose results have no place in an answer."""
FIELDS = ("prompt", "stream", *(name for name in SAMPLING_FIELDS if name not in LOST_FIELDS))


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A request to `/generate`.

    Attributes:
        prompt: Text, or token ids.
        stream: Whether texts are sent as they grow. None: as the client's `Accept` header has it.
        params: All other fields of the request.
    """

    prompt: str | list[int]
    stream: bool | None
    params: SamplingParams


def parse(document: dict[str, Any]) -> GenerateRequest:
    """Checks a request's fields.

    Raises:
        InvalidRequestError: Naming the first field that is unknown, missing or out of its range.
    """
    document = {name: value for name, value in document.items() if value is not None or name not in (*FIELDS, *LOST_FIELDS)}
    for name in document:
        if name in LOST_FIELDS:
            raise InvalidRequestError(
                f"{name} has no place in an answer of /generate. Leave it out, or use the OpenAI frontend: "
                "`cacheflow serve openai`, POST /v1/completions.",
                param=name,
            )
        if name not in FIELDS:
            close = difflib.get_close_matches(name[:64], FIELDS, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known fields: {', '.join(FIELDS)}."
            raise InvalidRequestError(f"Unknown field {name[:64]!r}. {hint}", param=name[:64])
    prompt, stream = document.get("prompt"), document.get("stream")
    # `type`, because a bool is an int too.
    if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(type(i) is int for i in prompt))):
        raise InvalidRequestError(f"prompt must be a string or a list of token ids, got {shown(prompt)}.", param="prompt")
    if not isinstance(stream, bool | None):
        raise InvalidRequestError(f"stream must be true or false, got {shown(stream)}.", param="stream")
    params = sampling_params({name: value for name, value in document.items() if name in SAMPLING_FIELDS})
    return GenerateRequest(prompt=prompt, stream=stream, params=params)


def _json_schema(hint: Any) -> dict[str, Any]:
    """A type as JSON Schema; an empty one where JSON has no such type."""
    if hint is bool or hint is int or hint is float or hint is str or hint is type(None):
        return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}.get(hint, "null")}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_json_schema(argument) for argument in arguments]}
    if origin is Sequence:
        return {"type": "array", "items": _json_schema(arguments[0])}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _json_schema(arguments[1])}
    return {}


def _properties() -> dict[str, Any]:
    """The sampling parameters as JSON Schema, with the words of their docstring."""
    texts, hints, properties = sampling_texts(), get_type_hints(SamplingParams), {}
    for entry in fields(SamplingParams):
        if entry.name not in LOST_FIELDS:
            default = {} if entry.default_factory is dict else entry.default
            properties[entry.name] = {
                **_json_schema(hints[entry.name]),
                "default": list(default) if isinstance(default, tuple) else default,
                "description": texts.get(entry.name, ""),
            }
    return properties


REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["prompt"],
                "additionalProperties": False,
                "properties": {
                    "prompt": {
                        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}],
                        "description": "Text, or token ids.",
                    },
                    "stream": {
                        "type": "boolean",
                        "description": "Send the texts as they grow. Default: false, or true with `Accept: text/event-stream`.",
                    },
                    **_properties(),
                },
            }
        }
    },
}
"""The request in the OpenAPI document, made from `SamplingParams`."""

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ENTRY = {
    "type": "object",
    "properties": {
        "token": {"type": "string"},
        "logprob": {"type": "number"},
        "top": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {"type": "array", "items": {"type": "string"}, "description": "The prompt with each completion."},
        "logprobs": {
            "type": "array",
            "items": {"type": "array", "items": _ENTRY},
            "description": "Of each completion, an entry per token; only when `logprobs` was asked for.",
        },
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The texts. A stream has such documents, each with everything so far: each followed by a NUL byte, or "
        "as server-sent events with `finish_reasons` too, the last of which is `[DONE]`.",
        "content": {"application/json": {"schema": _ANSWER}, "text/event-stream": {"schema": {"type": "string"}}},
    },
    **{
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in {
            400: "The body is no JSON object, or a field is unknown, missing or out of its range; `param` names it.",
            401: "The server has API keys, and none was sent.",
            403: "The Host or the Origin is not allowed.",
            408: "The body did not arrive in time.",
            413: "The body is too large.",
            415: "The body is compressed.",
            431: "The headers are too large.",
            500: "The request failed.",
            503: "The engine is overloaded, loading, ending or gone; Retry-After may say when to try again.",
        }.items()
    },
}
"""The answers in the OpenAPI document."""
