"""The OpenAPI document of the frontend: what every route takes, and every status it may answer with.

It is written by hand, because the routes read their JSON themselves: they answer OpenAI's errors where a framework's own
checks would answer 422. It knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cacheflow.edge import EdgeOptions
from cacheflow.types import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKEN_IDS,
)
from cacheflow_openai.chat_schema import MAX_MESSAGES, MAX_TEMPLATE_VARIABLES, MAX_TOOLS, MAX_TOP_LOGPROBS, ROLES
from cacheflow_openai.embeddings import MAX_INPUTS
from cacheflow_openai.fields import MAX_SEED, MAX_STOP_STRINGS, MIN_SEED
from cacheflow_openai.schema import MAX_PROMPTS

Schema = dict[str, Any]

ERRORS = {
    400: "A field is missing or out of its range, the body is no JSON, or prompt and answer don't fit into the context.",
    401: "No valid API key.",
    403: "A Host or an Origin that is not allowed.",
    404: "No such model.",
    405: "A method that the route doesn't have.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not called JSON, or it is compressed.",
    431: "The headers are too large.",
    500: "The request failed.",
    503: "The engine is overloaded, loading or ending; Retry-After says when to try again.",
}
GET_ERRORS = (400, 401, 403, 405, 413, 431, 500, 503)


def _nullable(kind: str, **rules: Any) -> Schema:
    return {"type": [kind, "null"], **rules}


def _whole(low: int, high: int | None = None, **rules: Any) -> Schema:
    return _nullable("integer", minimum=low, **({} if high is None else {"maximum": high}), **rules)


def _number(low: float, high: float, **rules: Any) -> Schema:
    return _nullable("number", minimum=low, maximum=high, **rules)


def _list(items: Schema, most: int | None = None, least: int = 0) -> Schema:
    bounds = {"minItems": least, **({} if most is None else {"maxItems": most})}
    return {"type": "array", "items": items, **bounds}


def _object(properties: dict[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


TEXT: Schema = {"type": "string"}
NON_EMPTY: Schema = {"type": "string", "minLength": 1}
FLAG = _nullable("boolean")
TOKEN_ID: Schema = {"type": "integer", "minimum": 0}
TOKEN_IDS = _list(TOKEN_ID, least=1)
WORD: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
STRUCTURED = _nullable(
    "object",
    description="One of json_schema, json_object, regex, grammar and choices: what the text must be.",
)
SAMPLING: dict[str, Schema] = {
    "n": _whole(1, MAX_N),
    "best_of": _whole(1, MAX_N, description="At least n; generated tokens of all of them are counted."),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _nullable("number", minimum=0.01, maximum=10),
    "temperature": _number(0, 100),
    "top_p": _nullable("number", exclusiveMinimum=0, maximum=1),
    "top_k": _whole(-1, 2**31 - 1),
    "min_p": _number(0, 1),
    "seed": _whole(MIN_SEED, MAX_SEED),
    "use_beam_search": FLAG,
    "length_penalty": _number(-10, 10),
    "early_stopping": {"type": ["boolean", "string", "null"]},
    "stop": {"anyOf": [WORD, _list(WORD, MAX_STOP_STRINGS), {"type": "null"}]},
    "stop_token_ids": {"anyOf": [_list(TOKEN_ID, MAX_STOP_TOKEN_IDS), {"type": "null"}]},
    "include_stop_str_in_output": FLAG,
    "ignore_eos": FLAG,
    "max_tokens": _whole(0, description="0 only with echo."),
    "min_tokens": _whole(0),
    "logprobs": _whole(0, MAX_LOGPROBS),
    "prompt_logprobs": _whole(0, MAX_LOGPROBS),
    "logit_bias": _nullable(
        "object", additionalProperties={"type": "number", "minimum": -100, "maximum": 100}, maxProperties=MAX_LOGIT_BIAS
    ),
    "allowed_token_ids": {"anyOf": [_list(TOKEN_ID, MAX_ALLOWED_TOKEN_IDS, 1), {"type": "null"}]},
    "bad_words": {"anyOf": [_list(WORD, MAX_BAD_WORDS), {"type": "null"}]},
    "skip_special_tokens": FLAG,
    "extra": _nullable("object"),
    "structured": STRUCTURED,
}
"""Every field of `SamplingParams`."""
MODEL_NAME: Schema = {"$ref": "#/components/schemas/ModelName"}
SHARED: dict[str, Schema] = {
    "model": MODEL_NAME,
    "stream": FLAG,
    "user": _nullable("string"),
    "cache_salt": _nullable("string", maxLength=256),
}
STREAM_OPTIONS = _nullable("object", properties={"include_usage": FLAG})
TEXT_PART = _object({"type": {"const": "text"}, "text": TEXT}, ("type", "text"))
REFUSAL_PART = _object({"type": {"const": "refusal"}, "refusal": TEXT}, ("type", "refusal"))
CONTENT: Schema = {"anyOf": [TEXT, _list({"anyOf": [TEXT_PART, REFUSAL_PART]}), {"type": "null"}]}
MESSAGE = _object(
    {
        "role": {"type": "string", "enum": list(ROLES)},
        "content": CONTENT,
        "refusal": _nullable("string"),
        "name": _nullable("string"),
        "tool_call_id": _nullable("string"),
        "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
    },
    ("role",),
)
FUNCTION: dict[str, Schema] = {
    "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    "description": _nullable("string"),
    "parameters": _nullable("object"),
    "strict": FLAG,
}
TOOL = _object({"type": {"const": "function"}, "function": _object(FUNCTION, ("name",))}, ("type", "function"))
FLAT_TOOL = _object({"type": {"const": "function"}, **FUNCTION}, ("type", "name"))
RESPONSE_FORMAT = _nullable(
    "object",
    properties={"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": _nullable("object")},
)
TOOL_CHOICE: Schema = {"anyOf": [{"enum": ["none", "auto", "required", None]}, {"type": "object"}]}
MESSAGES = _list(MESSAGE, MAX_MESSAGES, 1)

COMPLETION_REQUEST = _object(
    {
        **SHARED,
        **SAMPLING,
        "prompt": {"anyOf": [NON_EMPTY, TOKEN_IDS, _list({"anyOf": [NON_EMPTY, TOKEN_IDS]}, MAX_PROMPTS, 1)]},
        "suffix": {"type": ["string", "null"], "maxLength": 0, "description": "Not supported."},
        "echo": FLAG,
        "stream_options": STREAM_OPTIONS,
    },
    ("prompt",),
)
CHAT_REQUEST = _object(
    {
        **SHARED,
        **{name: schema for name, schema in SAMPLING.items() if name != "prompt_logprobs"},
        "messages": MESSAGES,
        "max_tokens": _whole(1),
        "max_completion_tokens": _whole(1, description="Default: what the context leaves."),
        "logprobs": FLAG,
        "top_logprobs": _whole(0, MAX_TOP_LOGPROBS),
        "stream_options": STREAM_OPTIONS,
        "response_format": RESPONSE_FORMAT,
        "tools": {"type": ["array", "null"], "items": TOOL, "maxItems": MAX_TOOLS},
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": FLAG,
        "chat_template_kwargs": _nullable("object", maxProperties=MAX_TEMPLATE_VARIABLES),
    },
    ("messages",),
)
RESPONSE_REQUEST = _object(
    {
        **SHARED,
        "input": {"anyOf": [TEXT, _list({"type": "object"}, MAX_MESSAGES, 1)]},
        "instructions": _nullable("string"),
        "max_output_tokens": _whole(1),
        "temperature": SAMPLING["temperature"],
        "top_p": SAMPLING["top_p"],
        "top_logprobs": _whole(0, MAX_TOP_LOGPROBS),
        "include": {"type": ["array", "null"], "items": TEXT},
        "text": _nullable("object", properties={"format": {"type": ["object", "null"]}}),
        "tools": {"type": ["array", "null"], "items": FLAT_TOOL, "maxItems": MAX_TOOLS},
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": FLAG,
        "previous_response_id": {"type": "null", "description": "Not supported."},
    },
    ("input",),
)
EMBEDDING_REQUEST = _object(
    {
        "model": MODEL_NAME,
        "input": {"anyOf": [NON_EMPTY, TOKEN_IDS, _list({"anyOf": [NON_EMPTY, TOKEN_IDS]}, MAX_INPUTS, 1)]},
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": {"type": "null", "description": "Not supported."},
        "pooling": {"enum": ["mean", "last", None]},
        "cache_salt": SHARED["cache_salt"],
        "user": SHARED["user"],
    },
    ("input",),
)
TOKENIZE_REQUEST = _object(
    {
        "model": MODEL_NAME,
        "prompt": _nullable("string", description="Either this or messages."),
        "messages": {"anyOf": [MESSAGES, {"type": "null"}]},
        "tools": {"type": ["array", "null"], "items": TOOL, "maxItems": MAX_TOOLS},
        "add_special_tokens": FLAG,
        "return_token_strs": FLAG,
    }
)
DETOKENIZE_REQUEST = _object({"model": MODEL_NAME, "tokens": _list(TOKEN_ID), "skip_special_tokens": FLAG}, ("tokens",))

COUNT: Schema = {"type": "integer", "minimum": 0}
EVENT = _object({"event": TEXT, "data": TEXT}, ("data",))
USAGE = _object({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}, ("prompt_tokens", "total_tokens"))
CHOICE = _object({"index": COUNT, "finish_reason": TEXT}, ("index", "finish_reason"))
MODEL = _object({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT}, ("id", "object"))


def _answer(kind: str, **fields: Schema) -> Schema:
    return _object({"object": {"const": kind}, "model": TEXT, **fields}, ("object", "model", *fields))


POST_ROUTES: dict[str, tuple[str, Schema, Schema, bool]] = {
    "/v1/completions": (
        "Completes texts.",
        COMPLETION_REQUEST,
        _answer("text_completion", id=TEXT, created=COUNT, choices=_list(CHOICE), usage=USAGE),
        True,
    ),
    "/v1/chat/completions": (
        "Answers a conversation.",
        CHAT_REQUEST,
        _answer("chat.completion", id=TEXT, created=COUNT, choices=_list(CHOICE), usage=USAGE),
        True,
    ),
    "/v1/responses": (
        "Answers a conversation, in the form of OpenAI's newer API.",
        RESPONSE_REQUEST,
        _answer("response", id=TEXT, created_at=COUNT, output=_list({"type": "object"}), status=TEXT),
        True,
    ),
    "/v1/embeddings": (
        "Makes vectors of texts.",
        EMBEDDING_REQUEST,
        _answer("list", data=_list({"type": "object"}), usage=USAGE),
        False,
    ),
    "/tokenize": (
        "The token ids of a text or a conversation.",
        TOKENIZE_REQUEST,
        _object({"count": COUNT, "max_model_len": COUNT, "tokens": _list(TOKEN_ID)}, ("count", "max_model_len", "tokens")),
        False,
    ),
    "/detokenize": ("The text of token ids.", DETOKENIZE_REQUEST, _object({"prompt": TEXT}, ("prompt",)), False),
}
"""Path → what it does, request, answer, and whether it streams."""
GET_ROUTES: dict[str, tuple[str, Schema]] = {
    "/health": ("Whether the process lives.", _object({"status": TEXT}, ("status",))),
    "/health/ready": ("Whether it takes requests.", _object({"status": TEXT}, ("status",))),
    "/stats": ("Readings of the engine and of the last minute's latencies.", {"type": "object"}),
    "/stats/view": ("Which requests hold which blocks.", {"type": "object"}),
    "/version": ("The versions of frontend and engine.", _object({"version": TEXT}, ("version",))),
    "/v1/models": ("The one model.", _object({"object": {"const": "list"}, "data": _list(MODEL)}, ("object", "data"))),
}
"""Path → what it does, and its answer."""


def openapi_document(options: EdgeOptions, names: Sequence[str]) -> dict[str, Any]:
    """The document, which a frontend serves at `/openapi.json`.

    Args:
        options: Of the frontend.
        names: What clients call the model.
    """
    paths: dict[str, Any] = {path: {"get": _get(*route)} for path, route in GET_ROUTES.items()}
    paths["/metrics"] = {"get": _get("Readings for Prometheus.", TEXT, "text/plain")}
    shown = _get("The model of that name.", MODEL)
    shown["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    shown["responses"]["404"] = _error(404)
    paths["/v1/models/{model}"] = {"get": shown}
    for path, route in POST_ROUTES.items():
        paths[path] = {"post": _post(*route)}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "cacheflow", "version": version("cacheflow-openai")},
        "paths": paths,
        "components": {
            "schemas": {
                "ModelName": {"enum": [*names, None]},
                "Error": _object(
                    {
                        "error": _object(
                            {
                                "message": TEXT,
                                "type": TEXT,
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                            ("message", "type", "param", "code"),
                        )
                    },
                    ("error",),
                ),
            }
        },
    }
    if options.root_path:
        document["servers"] = [{"url": options.root_path}]
    if options.api_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _get(summary: str, answer: Schema, media_type: str = "application/json") -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": {media_type: {"schema": answer}}}}
    return {"summary": summary, "responses": answers | {str(status): _error(status) for status in GET_ERRORS}}


def _post(summary: str, request: Schema, answer: Schema, can_stream: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if can_stream:
        content["text/event-stream"] = {"schema": EVENT}
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": answers | {str(status): _error(status) for status in ERRORS},
    }


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": ERRORS[status], "content": content}
