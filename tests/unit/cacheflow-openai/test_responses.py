"""`/v1/responses` on a real engine with a model that calls tools, driven in process."""

from __future__ import annotations

import json
from typing import Any

import pytest

GREETING = "Hello there 😀, how are you?"
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": CITY},
    {"type": "function", "name": "get_time"},
]


def respond(client: Any, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/responses", json={"input": "Hi", "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(client: Any, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each named by its type and numbered."""
    answer = client.post("/v1/responses", json={"input": "Hi", "temperature": 0, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    events = []
    for number, block in enumerate(answer.text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, number) == (f"event: {event['type']}", event["sequence_number"])
        events.append(event)
    return events


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]]
    usage = {**response["usage"], "input_tokens_details": None}  # The prompt is cached the second time.
    return {**response, "id": None, "created_at": None, "output": output, "usage": usage}


def test_a_response_is_an_openai_object(chat_client: Any) -> None:
    response = respond(chat_client, instructions="Be kind.")
    assert response["id"].startswith("resp_")
    assert (response["object"], response["status"], response["error"]) == ("response", "completed", None)
    [item] = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": GREETING, "annotations": [], "logprobs": []}]
    usage = response["usage"]
    assert usage["output_tokens"] == 12
    assert usage["total_tokens"] == usage["input_tokens"] + 12


def test_instructions_and_items_are_a_conversation(chat_client: Any) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    num_tokens = chat_client.post("/tokenize", json={"messages": messages}).json()["count"]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    for given in ("Hi", items):
        response = respond(chat_client, input=given, instructions="Be kind.")
        assert response["usage"]["input_tokens"] == num_tokens


def test_tools_are_called_and_their_results_answered(chat_client: Any) -> None:
    response = respond(chat_client, tools=TOOLS)
    message, weather, time = response["output"]
    assert message["content"][0]["text"] == "Let me look."
    assert (weather["type"], weather["name"], json.loads(weather["arguments"])) == (
        "function_call", "get_weather", {"city": "Paris", "days": [1, 2]},
    )  # fmt: skip
    assert (time["name"], time["arguments"]) == ("get_time", "{}")
    results = [{"type": "function_call_output", "call_id": c["call_id"], "output": "sunny"} for c in (weather, time)]
    response = respond(chat_client, tools=TOOLS, input=[{"role": "user", "content": "Hi"}, *response["output"], *results])
    assert response["output"][0]["content"][0]["text"] == "It is sunny in Paris."


def test_a_tool_can_be_named(chat_client: Any) -> None:
    response = respond(chat_client, tools=TOOLS, tool_choice={"type": "function", "name": "get_weather"})
    [call] = response["output"]
    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert json.loads(call["arguments"]) == {"city": "Paris"}


def test_a_text_in_a_json_schema_is_of_that_schema(chat_client: Any) -> None:
    form = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    response = respond(chat_client, text={"format": form})
    assert json.loads(response["output"][0]["content"][0]["text"]) == {"city": "Paris"}
    assert response["text"]["format"] == form


def test_an_answer_that_meets_its_limit_is_incomplete(chat_client: Any) -> None:
    response = respond(chat_client, max_output_tokens=2)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["content"][0]["text"] == "Hello there"
    assert events_of(chat_client, max_output_tokens=2)[-1]["type"] == "response.incomplete"


def test_logprobs_are_included_where_they_are_asked_for(chat_client: Any) -> None:
    response = respond(chat_client, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response["output"][0]["content"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in logprobs).decode() == GREETING
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}, {"top_logprobs": 1}, {"max_output_tokens": 1}])
def test_the_last_event_has_the_whole_response(chat_client: Any, fields: dict[str, Any]) -> None:
    events = events_of(chat_client, **fields)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.in_progress", "response.output_item.added"]
    whole, last = respond(chat_client, **fields), events[-1]["response"]
    assert without_ids(last) == without_ids(whole)
    texts = {event["output_index"]: event["text"] for event in events if event["type"] == "response.output_text.done"}
    for index, text in texts.items():
        deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta" and e["output_index"] == index]
        assert "".join(deltas) == text == last["output"][index]["content"][0]["text"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"input": "x" * 3000}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": 1}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "bogus"}}}}, "text.format"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0].parameters"),
        ({"input": [{"type": "function_call", "name": 1, "call_id": "c"}]}, "input[0].name"),
        ({"tools": 1}, "tools"),
        ({"include": "all"}, "include"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named(chat_client: Any, fields: dict[str, Any], param: str, stream: bool) -> None:
    answer = chat_client.post("/v1/responses", json={"input": "Hi", "stream": stream, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_fields_that_mean_nothing_are_named_in_a_header(chat_client: Any) -> None:
    body = {"input": "Hi", "max_output_tokens": 1, "store": True, "n": 2}
    assert chat_client.post("/v1/responses", json=body).headers["x-cacheflow-ignored-fields"] == "store, n"
