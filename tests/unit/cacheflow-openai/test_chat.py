"""`/v1/chat/completions` on a real engine with a model that calls tools, driven in process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cacheflow.errors import InvalidRequestError
from cacheflow_openai.app import OpenAIFrontend, OpenAIOptions
from cacheflow_openai.chat_schema import parse_messages

HI = [{"role": "user", "content": "Hi"}]
GREETING = "Hello there 😀, how are you?"
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "In a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time"}},
]
BAD_CALLS = [{"function": {"name": "f", "arguments": [1]}}]
LONG = {"schema": {"description": "y" * 300_000}}
DEEP: Any = {"type": "object"}
for _ in range(100):
    DEEP = {"type": "object", "properties": {"x": DEEP}}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
"""No text fits it, which only the engine finds out: with the tokens."""
CALLS = [("get_weather", {"city": "Paris", "days": [1, 2]}), ("get_time", {})]


def chat(client: Any, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": HI, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks_of(client: Any, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends with exactly one [DONE]."""
    answer = client.post("/v1/chat/completions", json={"messages": HI, "temperature": 0, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    *chunks, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the chunks of each choice make together: as a whole answer has it."""
    whole: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice["delta"]
        if choice["index"] not in whole:
            assert delta == {"role": "assistant", "content": ""}
            message = {"role": "assistant", "content": "", "tool_calls": []}
            whole[choice["index"]] = {"index": choice["index"], "message": message, "logprobs": [], "finish_reason": None}
            continue
        made = whole[choice["index"]]
        assert made["finish_reason"] is None, "a chunk after the last one"
        made["finish_reason"] = choice["finish_reason"]
        made["message"]["content"] += delta.get("content", "")
        made["logprobs"] += (choice["logprobs"] or {}).get("content", [])
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(made["message"]["tool_calls"])
                made["message"]["tool_calls"].append({"type": call["type"], "function": dict(call["function"])})
            else:
                made["message"]["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return whole


def comparable(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a whole answer without what is different each time, in the form of `joined`."""
    message = choice["message"]
    calls = [{"type": call["type"], "function": call["function"]} for call in message.get("tool_calls", [])]
    return {
        "index": choice["index"],
        "message": {"role": message["role"], "content": message["content"] or "", "tool_calls": calls},
        "logprobs": (choice["logprobs"] or {"content": []})["content"],
        "finish_reason": choice["finish_reason"],
    }


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


def refusal(client: Any, status: int = 400, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_chat_completion_is_an_openai_object(chat_client: Any) -> None:
    answer = chat(chat_client)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "scripted")
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": GREETING, "refusal": None}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "stop")
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_the_limit_of_stop_strings_is_told_as_it_is_here(chat_client: Any) -> None:
    for stop in ("", list("abcde"), 1):
        assert "stop must be at most 4 strings of 1 to 256 characters" in refusal(chat_client, stop=stop)["message"]


def test_what_an_assistant_refused_is_part_of_the_conversation() -> None:
    for said in ({"content": [{"type": "refusal", "refusal": "No."}]}, {"content": None, "refusal": "No."}):
        assert parse_messages([{"role": "assistant", **said}]) == [{"role": "assistant", "content": "No."}]
    with pytest.raises(InvalidRequestError, match="part of type 'refusal'"):
        parse_messages([{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}])


def test_the_prompt_is_what_the_template_writes(chat_client: Any) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]  # fmt: skip
    tokens = chat_client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert chat_client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == (
        "<|im_start|>system\nBe\nkind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant<|answer|>"
    )
    assert chat(chat_client, messages=messages)["usage"]["prompt_tokens"] == len(tokens)


def test_without_a_limit_the_answer_may_fill_the_context(chat_client: Any) -> None:
    answer = chat(chat_client, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 2048
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_limit(chat_client: Any, name: str) -> None:
    [choice] = chat(chat_client, **{name: 2})["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello there", "length")


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 2048}, {"messages": [{"role": "user", "content": "x" * 2100}]}])
def test_what_does_not_fit_into_the_context_is_refused_as_openai_does(chat_client: Any, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        error = refusal(chat_client, stream=stream, **fields)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] in fields
        assert "2048" in error["message"]


def test_tools_are_called_beside_what_is_said(chat_client: Any) -> None:
    [choice] = chat(chat_client, tools=TOOLS)["choices"]
    assert choice["message"]["content"] == "Let me look."
    assert called(choice["message"]) == CALLS
    assert choice["finish_reason"] == "tool_calls"
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2


def test_one_call_at_a_time_can_be_asked_for(chat_client: Any) -> None:
    [choice] = chat(chat_client, tools=TOOLS, parallel_tool_calls=False)["choices"]
    assert called(choice["message"]) == CALLS[:1]


def test_a_tools_result_leads_to_an_answer(chat_client: Any) -> None:
    [choice] = chat(chat_client, tools=TOOLS)["choices"]
    results = [{"role": "tool", "content": "sunny", "tool_call_id": c["id"]} for c in choice["message"]["tool_calls"]]
    [choice] = chat(chat_client, tools=TOOLS, messages=[*HI, choice["message"], *results])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is sunny in Paris.", "stop")


def test_with_tool_choice_none_the_model_is_shown_no_tools(chat_client: Any) -> None:
    [choice] = chat(chat_client, tools=TOOLS, tool_choice="none")["choices"]
    assert choice["message"]["content"] == GREETING


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_one_of_the_tools(chat_client: Any, stream: bool) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    choice = joined(chunks_of(chat_client, **fields))[0] if stream else comparable(chat(chat_client, **fields)["choices"][0])
    [(name, arguments)] = called(choice["message"])
    assert arguments in ([{"city": "Paris"}, {"city": "Rome"}] if name == "get_weather" else [{}])
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called(chat_client: Any, stream: bool) -> None:
    fields = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    choice = joined(chunks_of(chat_client, **fields))[0] if stream else comparable(chat(chat_client, **fields)["choices"][0])
    [(name, arguments)] = called(choice["message"])
    assert name == "get_weather"
    assert arguments["city"] in ("Paris", "Rome")
    assert choice["finish_reason"] == "stop"


def test_tools_with_references_to_their_own_parts_can_be_required(chat_client: Any) -> None:
    place = {"place": {"$ref": "#/$defs/Place"}}
    parameters = {"type": "object", "properties": place, "required": ["place"], "additionalProperties": False}
    parameters["$defs"] = {"Place": {"enum": ["here"]}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    [choice] = chat(chat_client, tools=tools, tool_choice="required", parallel_tool_calls=False)["choices"]
    assert called(choice["message"]) == [("f", {"place": "here"})]


def test_an_answer_in_a_json_schema_is_of_that_schema(chat_client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    [choice] = chat(chat_client, response_format=form)["choices"]
    assert json.loads(choice["message"]["content"])["city"] in ("Paris", "Rome")


def test_a_json_object_can_be_asked_for(chat_client: Any) -> None:
    [choice] = chat(chat_client, response_format={"type": "json_object"}, max_tokens=200)["choices"]
    assert choice["message"]["content"].lstrip().startswith("{")


def test_a_schema_that_is_none_is_the_requests_fault(chat_client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    assert refusal(chat_client, response_format=form)["type"] == "invalid_request_error"
    assert chat(chat_client)["choices"], "the engine did not survive it"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1, "seed": 5, "max_tokens": 20},
        {"logprobs": True, "top_logprobs": 3, "max_tokens": 8},
        {"stop": ["how", "you?"]},
        {"tools": TOOLS},
        {"tools": TOOLS, "max_tokens": 7},
        {"tools": TOOLS, "parallel_tool_calls": False, "logprobs": True},
        {"n": 2, "best_of": 3, "temperature": 1, "seed": 1, "max_tokens": 5},
        {"n": 2, "use_beam_search": True, "max_tokens": 4},
    ],
)
def test_the_chunks_of_a_stream_make_the_whole_message(chat_client: Any, fields: dict[str, Any]) -> None:
    whole = chat(chat_client, **fields)
    chunks = chunks_of(chat_client, **fields, stream_options={"include_usage": True})
    streamed = joined(chunks)
    assert [streamed[index] for index in sorted(streamed)] == [comparable(choice) for choice in whole["choices"]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_characters_of_several_tokens_come_whole(chat_client: Any) -> None:
    contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks_of(chat_client)]
    assert "😀" in contents or " 😀" in contents
    assert not [content for content in contents if "\ufffd" in content]


def test_best_of_counts_all_that_was_generated(chat_client: Any) -> None:
    usage = chat(chat_client, n=1, best_of=3, temperature=1, max_tokens=5, ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 15


def test_every_token_of_the_text_has_its_logprob(chat_client: Any) -> None:
    [choice] = chat(chat_client, logprobs=True, top_logprobs=2)["choices"]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 2
        assert (entry["token"], entry["logprob"]) in [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]


def test_a_chosen_token_that_is_unlikely_is_among_the_top_logprobs_too(chat_client: Any) -> None:
    [choice] = chat(chat_client, logprobs=True, top_logprobs=1, temperature=10, seed=3, max_tokens=30)["choices"]
    entries = choice["logprobs"]["content"]
    assert any(len(entry["top_logprobs"]) == 2 for entry in entries)
    for entry in entries:
        assert (entry["bytes"], entry["logprob"]) in [(top["bytes"], top["logprob"]) for top in entry["top_logprobs"]]


def test_logprobs_without_a_number_have_no_alternatives(chat_client: Any) -> None:
    [choice] = chat(chat_client, logprobs=True)["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * 11


def test_a_model_without_tools_or_template_says_so(engine: Any, app_client: Any) -> None:
    client = app_client(OpenAIFrontend.create_app(engine, OpenAIOptions()))
    assert "no chat template" in refusal(client)["message"]
    assert refusal(client, tools=TOOLS)["param"] == "tools"


def test_fields_that_mean_nothing_are_named_in_a_header(chat_client: Any) -> None:
    body = {"messages": HI, "max_tokens": 1, "user": "me", "store": True, "prompt_logprobs": 1}
    answer = chat_client.post("/v1/chat/completions", json=body)
    assert answer.headers["x-cacheflow-ignored-fields"] == "store, prompt_logprobs"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [('{"x": 1}', '{"x": 1}'), ("", "{}"), ('{"x": ', '"{\\"x\\": "'), ("[1]", '"[1]"'), ('{"x": "\\ud800"}', None)],
)
def test_a_conversation_goes_on_from_calls_with_wrong_arguments(chat_client: Any, arguments: str, shown: str | None) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "Wrong."}]
    assert chat(chat_client, messages=messages)["choices"][0]["message"]["content"] == "It is sunny in Paris."
    ids = chat_client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    prompt = chat_client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert shown is None or f'<tool_call>{{"name": "f", "arguments": {shown}}}</tool_call>' in prompt


def test_variables_reach_the_template(chat_client: Any) -> None:
    assert chat(chat_client, chat_template_kwargs={"enable_thinking": False})["choices"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": BAD_CALLS}]}, "messages[0].tool_calls[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "bogus"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": LOOP}}}, "response_format"),
        ({"structured": {"json_schema": LOOP}}, "json_schema"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "bogus"}}}],
          "tool_choice": "required"}, "tools"),
        ({"structured": {"json_schema": {"type": "bogus"}}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": LONG}}, "response_format.json_schema.schema"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "1"}, "max_completion_tokens"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [None]}, "stop"),
        ({"n": 0}, "n"),
        ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(chat_client: Any, fields: dict[str, Any], param: str) -> None:
    error = refusal(chat_client, **fields)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_client_that_hangs_up_frees_its_blocks(chat_client: Any, chat_engine: Any, loop: Any) -> None:
    fields = {"messages": HI, "stream": True, "ignore_eos": True, "n": 4}
    parts = chat_client.post_and_hang_up("/v1/chat/completions", json.dumps(fields).encode(), after_parts=6)
    assert b"[DONE]" not in b"".join(parts)
    stats = loop.run(chat_engine.stats())
    assert stats.num_running == stats.num_waiting == 0
