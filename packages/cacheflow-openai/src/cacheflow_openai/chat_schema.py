"""What `POST /v1/chat/completions` accepts, and what `/v1/responses` is made into. It knows no HTTP and no engine.

The fields are OpenAI's, and beside them the sampling parameters that mean something in a chat, `cache_salt` and
`chat_template_kwargs`. A null stands for the default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cacheflow.asgi import sampling_params
from cacheflow.errors import InvalidRequestError
from cacheflow.types import SamplingParams, StructuredOutput
from cacheflow_openai.fields import (
    check_stop,
    choice,
    flag,
    given,
    ignored,
    include_usage,
    mapping,
    must_be,
    sampling_fields,
    schema,
    string,
    structure_errors_named,
    whole,
)

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CALLS = 16
"""Most tool calls of one answer; a forced answer may not have more, and further ones of others are dropped."""
MAX_TOP_LOGPROBS = 20
MAX_TEMPLATE_VARIABLES = 16
ROLES = ("system", "developer", "user", "assistant", "tool")
OWN_FIELDS = (
    "model", "messages", "max_completion_tokens", "top_logprobs", "stream", "stream_options", "response_format", "tools",
    "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "user", "cache_salt",
)  # fmt: skip
"""Those beside the sampling parameters. `user` changes nothing."""
NO_SAMPLING_FIELDS = ("prompt_logprobs",)
"""Sampling parameters that a chat has no place for."""
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
"""Of a tool that doesn't say what it takes, which is nothing."""
_TOOL_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer calls tools.

    Attributes:
        mode: "none", "auto", "required", or "named".
        name: The tool of "named".
    """

    mode: str
    name: str = ""

    @property
    def is_forced(self) -> bool:
        """Whether the answer is nothing but calls, which structured output sees to."""
        return self.mode in ("required", "named")


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A request for an assistant's message.

    Attributes:
        model: The model's name as the client knows it. None: whatever is served.
        messages: As the chat template reads them: each with a role and text.
        tools: In OpenAI's form, those that the template is shown.
        tool_choice: What is to be done with them.
        max_calls: Most tool calls of the answer.
        params: Of the answer.
        prompt_param: The field that the messages come from.
        limit_param: The field that `params.max_tokens` comes from.
        structure_param: The field that `params.structured` comes from, if that is not its own.
        top_logprobs: How many alternatives each token is listed with; None: log probabilities are not listed.
        template_variables: More of what the chat template reads.
        stream: Whether the message is sent as it grows.
        include_usage: Whether a stream ends with the token counts.
        cache_salt: Cached prompts are shared only under equal salts.
        ignored: Names of fields that mean nothing here.
    """

    model: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    tool_choice: ToolChoice
    max_calls: int
    params: SamplingParams
    prompt_param: str
    limit_param: str
    structure_param: str | None
    top_logprobs: int | None
    template_variables: dict[str, Any]
    stream: bool
    include_usage: bool
    cache_salt: str
    ignored: list[str]


def parse_chat(document: Mapping[str, Any]) -> ChatRequest:
    """Checks a request's fields.

    Raises:
        InvalidRequestError: Naming the first field that is missing or out of its range.
    """
    values = given(document)
    for name in ("functions", "function_call"):
        if values.get(name) not in (None, [], "none"):
            raise InvalidRequestError(f"{name} is not supported any more: use tools and tool_choice.", param=name)
    stream = flag(values, "stream")
    tools = parse_tools(values.get("tools", ()))
    tool_choice = parse_tool_choice(values.get("tool_choice"), tools)
    top_logprobs = _top_logprobs(values)
    check_stop(values)
    sampling = sampling_fields(values, NO_SAMPLING_FIELDS)
    limit_param = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
    sampling |= {"logprobs": top_logprobs, "max_tokens": whole(values, limit_param, 1)}
    max_calls = MAX_CALLS if flag(values, "parallel_tool_calls", True) else 1
    structured = parse_response_format(mapping(values, "response_format"), "response_format")
    return ChatRequest(
        model=string(values, "model"),
        messages=parse_messages(values.get("messages")),
        tools=[] if tool_choice.mode == "none" else tools,
        tool_choice=tool_choice,
        max_calls=max_calls,
        params=with_structure(sampling_params(sampling), structured, tools, tool_choice, max_calls),
        prompt_param="messages",
        limit_param=limit_param,
        structure_param="tools" if tool_choice.is_forced else None if structured is None else "response_format",
        top_logprobs=top_logprobs,
        template_variables=_template_variables(values),
        stream=stream,
        include_usage=include_usage(values, stream),
        cache_salt=string(values, "cache_salt") or "",
        ignored=[
            *ignored(document, OWN_FIELDS), *(name for name in document if name in NO_SAMPLING_FIELDS)
        ],
    )  # fmt: skip


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages with their content as one text, tool calls with their arguments as objects, as templates want them.

    Raises:
        InvalidRequestError: Naming the first message that is none.
    """
    if not isinstance(messages, list) or not messages:
        raise must_be("messages", f"a list of 1 to {MAX_MESSAGES} messages", messages)
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages has {len(messages)} entries; at most {MAX_MESSAGES} go into one request.", param="messages"
        )
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, param: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise must_be(param, "an object with role and content", message)
    values = given(message)
    role = choice(values, "role", ROLES, "", f"{param}.")
    calls = values.get("tool_calls", [])
    kinds = ("text", "refusal") if role == "assistant" else ("text",)
    content = values.get("content", values.get("refusal") if role == "assistant" else None)
    if content is None and not (role == "assistant" and calls):
        raise InvalidRequestError(f"{param}.content is missing.", param=f"{param}.content")
    # Templates know no "developer", which is what newer clients call "system".
    parsed: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": text_of("" if content is None else content, kinds, f"{param}.content"),
    }
    for name in ("name", "tool_call_id"):
        if name in values:
            parsed[name] = string(values, name, f"{param}.")
    if calls:
        if not isinstance(calls, list) or role != "assistant":
            raise InvalidRequestError(f"{param}.tool_calls must be a list, of an assistant's message.", param=param)
        parsed["tool_calls"] = [_tool_call(call, f"{param}.tool_calls[{number}]") for number, call in enumerate(calls)]
    return parsed


def text_of(content: Any, kinds: Sequence[str], param: str) -> str:
    """A content's text; parts are joined by line breaks.

    Args:
        content: Text, or a list of parts with their type and text.
        kinds: The types of parts that are taken.
        param: The field.

    Raises:
        InvalidRequestError: It is something else, such as an image.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise must_be(param, "a string or a list of parts", content)
    for part in content:
        if part.get("type") not in kinds or not isinstance(_text_of_part(part), str):
            kind = str(part.get("type"))[:40]
            raise InvalidRequestError(
                f"{param} has a part of type {kind!r}; this model reads only parts of type {' or '.join(kinds)}, with a text.",
                param=param,
            )
    return "\n".join(map(_text_of_part, content))


def _text_of_part(part: Mapping[str, Any]) -> Any:
    return part.get("refusal" if part.get("type") == "refusal" else "text")


def _tool_call(call: Any, param: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{param} must have a function with name and arguments.", param=param)
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments_of(function.get("arguments"), param)},
    }


def arguments_of(arguments: Any, param: str) -> dict[str, Any] | str:
    """A call's arguments as an object, which templates write as JSON.

    Text that is no JSON object stays text: a model may have written it, and a conversation must be able to go on from there.

    Raises:
        InvalidRequestError: They are neither text nor an object.
    """
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, (str, dict)):
        raise InvalidRequestError(f"{param}: the arguments must be a string that holds a JSON object.", param=param)
    if isinstance(arguments, dict):
        return arguments
    try:
        parsed = json.loads(arguments)
        # JSON can write half of a surrogate pair, which is no character and can't be encoded again.
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def parse_tools(tools: Any, place: str = "function.") -> list[dict[str, Any]]:
    """The tools, in the form that templates know.

    Args:
        tools: A list of them.
        place: What the client's form has between a tool and the fields of its function.

    Raises:
        InvalidRequestError: Naming the first that is no function, or whose name another has.
    """
    if not isinstance(tools, (list, tuple)) or len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools must be a list of at most {MAX_TOOLS} tools.", param="tools")
    parsed: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(tools):
        param = f"tools[{number}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise InvalidRequestError(f'{param} must be of type "function", with the {place}name.', param=param)
        function = given(tool["function"])
        name, description = function.get("name"), function.get("description", "")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name) or name in parsed:
            raise InvalidRequestError(
                f"{param}.{place}name must be 1 to 64 letters, digits, dots, dashes or underscores that no other tool has.",
                param=param,
            )
        if not isinstance(description, str):
            raise InvalidRequestError(f"{param}.{place}description must be a string.", param=param)
        parameters = schema(function.get("parameters", {}), f"{param}.{place}parameters")
        # The order of the keys is that in which the models were shown them.
        shown = {"name": name, "description": description, "parameters": parameters or NO_PARAMETERS}
        parsed[name] = {"type": "function", "function": shown}
    return list(parsed.values())


def parse_tool_choice(value: Any, tools: Sequence[dict[str, Any]]) -> ToolChoice:
    """What is to be done with the tools: "auto" if nothing is said of them, "none" without any.

    Raises:
        InvalidRequestError: It is no such thing, or names a tool that is not there.
    """
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if value in ("none", "auto", "required"):
        if value == "required" and not tools:
            raise InvalidRequestError("tool_choice is required, but there are no tools.", param="tool_choice")
        return ToolChoice(value if tools else "none")
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise InvalidRequestError(
            'tool_choice must be none, auto, required, or of type "function", with its name.', param="tool_choice"
        )
    if function.get("name") not in [tool["function"]["name"] for tool in tools]:
        raise InvalidRequestError("tool_choice names a function that is not among the tools.", param="tool_choice")
    return ToolChoice("named", function["name"])


def parse_response_format(value: Mapping[str, Any], param: str, place: str = "json_schema") -> StructuredOutput | None:
    """What the answer's text must be.

    Args:
        value: OpenAI's object. Its schema stands in its `json_schema`, as in chats, or in itself, as in responses.
        param: The field that it comes from.
        place: What is missing if there is no schema.

    Raises:
        InvalidRequestError: It is none of OpenAI's formats.
    """
    kind = choice(given(value), "type", ("text", "json_object", "json_schema"), "text", f"{param}.")
    if kind == "json_object":
        return StructuredOutput(json_object=True)
    if kind == "json_schema":
        described, holder = (value, param) if "schema" in value else (value.get("json_schema"), f"{param}.json_schema")
        if not isinstance(described, dict):
            raise InvalidRequestError(
                f"{param} is of type json_schema, but there is no {place} in it.", param=f"{param}.{place}"
            )
        with structure_errors_named(param):
            return StructuredOutput(json_schema=schema(described.get("schema", {}), f"{holder}.schema"))
    return None


def with_structure(
    params: SamplingParams,
    structured: StructuredOutput | None,
    tools: Sequence[dict[str, Any]],
    tool_choice: ToolChoice,
    max_calls: int,
) -> SamplingParams:
    """The parameters with what response format and tool choice ask of the text.

    Raises:
        InvalidRequestError: They ask for two things at once.
    """
    if tool_choice.is_forced:
        # An answer that must be a call is no answer in that format; OpenAI lets the call win too.
        with structure_errors_named("tools"):
            structured = StructuredOutput(json_schema=forced_schema(tools, tool_choice, max_calls))
    if structured is None:
        return params
    if params.structured is not None:
        raise InvalidRequestError(
            "structured says what the text must be, and so does response_format or tool_choice. Send one.", param="structured"
        )
    return replace(params, structured=structured)


def forced_schema(tools: Sequence[dict[str, Any]], tool_choice: ToolChoice, max_calls: int) -> dict[str, Any]:
    """What an answer that must call tools looks like: a list of calls, or the arguments of the one that is named."""
    functions = [tool["function"] for tool in tools]
    arguments = {f["name"]: f["parameters"] for f in functions}
    # An object of which nothing is said may have anything in it; a model that must write one may never come to its end.
    arguments = {n: {**s, "additionalProperties": False} if s == NO_PARAMETERS else s for n, s in arguments.items()}
    if tool_choice.mode == "named":
        return dict(arguments[tool_choice.name])
    definitions = {str(number): _moved(s, f"#/$defs/{number}") for number, s in enumerate(arguments.values())}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, function in enumerate(functions)
    ]
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": max_calls, "$defs": definitions}


def _moved(value: Any, place: str) -> Any:
    """A schema whose references to its own parts say where these are now."""
    if isinstance(value, list):
        return [_moved(item, place) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: place + item[1:] if key == "$ref" and isinstance(item, str) and item.startswith("#") else _moved(item, place)
        for key, item in value.items()
    }


def _top_logprobs(values: Mapping[str, Any]) -> int | None:
    wanted, number = flag(values, "logprobs"), whole(values, "top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    if number and not wanted:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    return number if wanted else None


def _template_variables(values: Mapping[str, Any]) -> dict[str, Any]:
    variables = mapping(values, "chat_template_kwargs")
    if len(variables) > MAX_TEMPLATE_VARIABLES or not all(
        isinstance(value, (str, int, float)) and len(str(value)) <= 256 for value in variables.values()
    ):
        raise InvalidRequestError(
            f"chat_template_kwargs must have at most {MAX_TEMPLATE_VARIABLES} entries, short strings, numbers or booleans.",
            param="chat_template_kwargs",
        )
    return variables
