"""What `POST /v1/responses` accepts: a chat in other words. It knows no HTTP and no engine.

Nothing is kept between requests: what refers to an earlier one is refused, and the whole conversation goes into `input`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cacheflow.asgi import sampling_params
from cacheflow.errors import InvalidRequestError
from cacheflow_openai.chat_schema import (
    MAX_CALLS,
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    NO_SAMPLING_FIELDS,
    ROLES,
    ChatRequest,
    arguments_of,
    parse_response_format,
    parse_tool_choice,
    parse_tools,
    text_of,
    with_structure,
)
from cacheflow_openai.fields import check_stop, choice, flag, given, ignored, mapping, sampling_fields, string, whole

OWN_FIELDS = (
    "model", "input", "instructions", "max_output_tokens", "top_logprobs", "include", "stream", "text", "tools", "tool_choice",
    "parallel_tool_calls", "previous_response_id", "conversation", "background", "user", "cache_salt",
)  # fmt: skip
REFUSED_FIELDS = ("n", "best_of", "use_beam_search", "logprobs", "max_tokens", "structured", *NO_SAMPLING_FIELDS)
"""Sampling parameters that a response has other words for, or no place."""
STATE_FIELDS = ("previous_response_id", "conversation")
TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True, kw_only=True)
class ResponseRequest:
    """A request for a response.

    Attributes:
        chat: The same as a chat.
        instructions: As they were sent.
        text: As it was sent.
        tools: As they were sent.
        tool_choice: As it was sent.
    """

    chat: ChatRequest
    instructions: str | None
    text: dict[str, Any]
    tools: list[Any]
    tool_choice: Any


def parse_response(document: Mapping[str, Any]) -> ResponseRequest:
    """Checks a request's fields.

    Raises:
        InvalidRequestError: Naming the first field that is missing or out of its range.
    """
    values = given(document)
    for name in STATE_FIELDS:
        if name in values:
            raise InvalidRequestError(
                f"{name} is not supported: nothing is kept between requests. Send the whole conversation as input.", param=name
            )
    if flag(values, "background"):
        raise InvalidRequestError("background is not supported: read the answer of the request.", param="background")
    check_stop(values)
    stream = flag(values, "stream")
    instructions = string(values, "instructions")
    sent_tools, sent_choice = values.get("tools", []), values.get("tool_choice")
    tools = parse_tools([_chat_tool(tool) for tool in sent_tools] if isinstance(sent_tools, list) else sent_tools, place="")
    tool_choice = parse_tool_choice(_chat_tool(sent_choice) if isinstance(sent_choice, dict) else sent_choice, tools)
    max_calls = MAX_CALLS if flag(values, "parallel_tool_calls", True) else 1
    top_logprobs = _top_logprobs(values)
    sampling = sampling_fields(values, REFUSED_FIELDS)
    sampling |= {"max_tokens": whole(values, "max_output_tokens", 1), "logprobs": top_logprobs}
    text = mapping(values, "text")
    structured = parse_response_format(mapping(given(text), "format"), "text.format", "schema")
    chat = ChatRequest(
        model=string(values, "model"),
        messages=_messages(values.get("input"), instructions),
        tools=[] if tool_choice.mode == "none" else tools,
        tool_choice=tool_choice,
        max_calls=max_calls,
        params=with_structure(sampling_params(sampling), structured, tools, tool_choice, max_calls),
        prompt_param="input",
        limit_param="max_output_tokens",
        structure_param="tools" if tool_choice.is_forced else None if structured is None else "text.format",
        top_logprobs=top_logprobs,
        template_variables={},
        stream=stream,
        include_usage=True,
        cache_salt=string(values, "cache_salt") or "",
        ignored=[*ignored(document, OWN_FIELDS), *(name for name in document if name in REFUSED_FIELDS)],
    )
    return ResponseRequest(
        chat=chat,
        instructions=instructions,
        text={"format": {"type": "text"}, **text},
        tools=[{"strict": False, "parameters": {}, **tool} for tool in sent_tools],
        tool_choice=sent_choice or "auto",
    )


def _chat_tool(tool: Any) -> Any:
    """A tool, or the choice of one, in the form that chats have."""
    if not isinstance(tool, dict):
        return tool
    return {"type": tool.get("type"), "function": {name: value for name, value in tool.items() if name != "type"}}


def _top_logprobs(values: Mapping[str, Any]) -> int | None:
    include, number = values.get("include", []), whole(values, "top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    if not isinstance(include, list):
        raise InvalidRequestError("include must be a list.", param="include")
    return number if LOGPROBS in include or number else None


def _messages(items: Any, instructions: str | None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not isinstance(items, list) or not items or len(items) > MAX_MESSAGES:
        raise InvalidRequestError(f"input must be a string or a list of 1 to {MAX_MESSAGES} items.", param="input")
    for number, item in enumerate(items):
        _add_item(messages, item, f"input[{number}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any, param: str) -> None:
    if not isinstance(item, dict):
        raise InvalidRequestError(f"{param} must be an object.", param=param)
    kind = item.get("type", "message")
    if kind == "message":
        role = choice(item, "role", ROLES, "", f"{param}.")
        text = text_of(item.get("content"), TEXT_PARTS, f"{param}.content")
        messages.append({"role": "system" if role == "developer" else role, "content": text})
    elif kind == "function_call":
        name, call_id = string(item, "name", f"{param}."), string(item, "call_id", f"{param}.")
        if not name or not call_id:
            raise InvalidRequestError(f"{param} must have a call_id and a name.", param=param)
        arguments = arguments_of(item.get("arguments"), param)
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    elif kind == "function_call_output":
        output = text_of(item.get("output"), TEXT_PARTS, f"{param}.output")
        messages.append({"role": "tool", "content": output, "tool_call_id": string(item, "call_id", f"{param}.") or ""})
    else:
        raise InvalidRequestError(
            f"{param}.type must be message, function_call or function_call_output, got {str(kind)[:40]!r}.",
            param=f"{param}.type",
        )
