"""Drives the server with LangChain. Arguments: base URL, API key."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

BASE_URL, KEY = sys.argv[1:]
COMMON: dict[str, Any] = {"base_url": BASE_URL, "api_key": KEY, "model": "scripted", "temperature": 0}
GREETING = "Hello there 😀, how are you?"


class Weather(BaseModel):
    """The weather."""

    city: Literal["Paris", "Rome"]


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def main() -> None:
    chat = ChatOpenAI(**COMMON)
    assert chat.invoke("Hi").content == GREETING
    assert "".join(str(chunk.content) for chunk in chat.stream("Hi")) == GREETING
    assert asyncio.run(chat.ainvoke("Hi")).content == GREETING
    assert [message.content for message in chat.batch(["Hi"] * 4)] == [GREETING] * 4
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Weather, method=method, strict=True).invoke("Hi"), Weather)
    with_tools = chat.bind_tools([get_weather])
    called = with_tools.invoke("Hi")
    assert [call["name"] for call in called.tool_calls] == ["get_weather", "get_time"]
    results = [ToolMessage("sunny", tool_call_id=call["id"]) for call in called.tool_calls]
    assert with_tools.invoke([HumanMessage("Hi"), called, *results]).content == "It is sunny in Paris."
    # It sends best_of, and max_tokens of its own choice.
    assert OpenAI(**COMMON, max_tokens=2).invoke("Let me") == " look.\n<tool_"
    assert "".join(OpenAI(**COMMON, max_tokens=2).stream("Let me")) == " look.\n<tool_"
    vectors = OpenAIEmbeddings(
        base_url=BASE_URL, api_key=KEY, model="scripted", check_embedding_ctx_length=False
    ).embed_documents(["Hello", "Hi"])
    assert [len(vector) for vector in vectors] == [512, 512]


main()
