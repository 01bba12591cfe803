"""Drives the server with the openai package of today. Arguments: base URL, API key."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import sys
from collections.abc import Callable
from typing import Any, Literal

import openai
from pydantic import BaseModel

BASE_URL, KEY = sys.argv[1:]
HI: list[Any] = [{"role": "user", "content": "Hi"}]
GREETING = "Hello there 😀, how are you?"


class Weather(BaseModel):
    """What the model is to answer."""

    city: Literal["Paris", "Rome"]


class GetWeather(BaseModel):
    """A tool's parameters."""

    city: Literal["Paris"]


TOOL = openai.pydantic_function_tool(GetWeather, name="get_weather")


def chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=HI, temperature=0, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == GREETING
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or []) == 11
    streamed, usage = "", None
    for chunk in client.chat.completions.create(
        model="scripted", messages=HI, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage
    assert streamed == GREETING
    assert usage is not None
    assert usage.completion_tokens == 12


def structures(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="scripted", messages=HI, temperature=0, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    response = client.responses.parse(model="scripted", input="Hi", temperature=0, text_format=Weather)
    assert isinstance(response.output_parsed, Weather)


def tools(client: openai.OpenAI) -> None:
    messages = list(HI)
    with client.chat.completions.stream(model="scripted", messages=messages, temperature=0, tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert message.content == "Let me look."
    calls = message.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather", "get_time"]
    assert json.loads(calls[0].function.arguments) == {"city": "Paris", "days": [1, 2]}
    messages.append(message)
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    answer = client.chat.completions.create(model="scripted", messages=messages, temperature=0, tools=[TOOL])
    assert answer.choices[0].message.content == "It is sunny in Paris."
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        forced = client.chat.completions.parse(
            model="scripted", messages=HI, temperature=0, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False
        )
        [call] = forced.choices[0].message.tool_calls or []
        assert call.function.parsed_arguments == GetWeather(city="Paris")


def responses(client: openai.OpenAI) -> None:
    assert client.responses.create(model="scripted", input="Hi", temperature=0).output_text == GREETING
    flat: Any = {"type": "function", "name": "get_weather", "parameters": {}, "strict": False}
    with client.responses.stream(model="scripted", input="Hi", temperature=0, tools=[flat]) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert text == response.output_text == "Let me look."
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    assert response.usage is not None
    assert response.usage.output_tokens == 14


def embeddings(client: openai.OpenAI) -> None:
    texts = ["Hello", "Hi there"]
    decoded = client.embeddings.create(model="scripted", input=texts)
    as_floats = client.embeddings.create(model="scripted", input=texts, encoding_format="float")
    as_text = client.embeddings.create(model="scripted", input=texts, encoding_format="base64")
    for mine, others, encoded in zip(decoded.data, as_floats.data, as_text.data, strict=True):
        assert abs(sum(x * x for x in others.embedding) - 1) < 1e-5
        data: Any = encoded.embedding
        assert len(mine.embedding) == len(others.embedding) == len(struct.unpack("<512f", base64.b64decode(data)))
        assert max(abs(x - y) for x, y in zip(mine.embedding, others.embedding, strict=True)) < 1e-6


def refusal(call: Callable[[], Any], kind: type[openai.APIStatusError]) -> Any:
    """The error that a call ends with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("the request was taken")


def refusals(client: openai.OpenAI) -> None:
    def chat(**fields: Any) -> Any:
        return client.chat.completions.create(**{"model": "scripted", "messages": HI, **fields})

    assert refusal(lambda: chat(max_completion_tokens=10**6), openai.BadRequestError).code == "context_length_exceeded"
    assert refusal(lambda: chat(temperature=-1), openai.BadRequestError).param == "temperature"
    assert refusal(lambda: chat(model="gpt-4"), openai.NotFoundError).code == "model_not_found"
    stranger = openai.OpenAI(base_url=BASE_URL, api_key="wrong", max_retries=0)
    assert refusal(stranger.models.list, openai.AuthenticationError).code == "invalid_api_key"


async def many_at_once() -> None:
    """32 streams at a time have the texts that they have alone."""
    client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY)

    async def text(number: int) -> str:
        stream = await client.completions.create(
            model="scripted", prompt=f"{number} Let", max_tokens=30, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    alone = [await text(number) for number in range(32)]
    assert await asyncio.gather(*map(text, range(32))) == alone


def main() -> None:
    client = openai.OpenAI(base_url=BASE_URL, api_key=KEY)
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").object == "model"
    for part in (chats, structures, tools, responses, embeddings, refusals):
        part(client)
    asyncio.run(many_at_once())


main()
