"""Drives the server with LiteLLM. Arguments: base URL, API key."""

from __future__ import annotations

import sys
from typing import Any

import litellm

BASE_URL, KEY = sys.argv[1:]
COMMON: dict[str, Any] = {"api_base": BASE_URL, "api_key": KEY, "temperature": 0}
HI = [{"role": "user", "content": "Hi"}]
GREETING = "Hello there 😀, how are you?"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]

litellm.telemetry = False
answer = litellm.completion(model="openai/scripted", messages=HI, **COMMON)
assert answer.choices[0].message.content == GREETING
chunks = litellm.completion(model="openai/scripted", messages=HI, stream=True, **COMMON)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING
called = litellm.completion(model="openai/scripted", messages=HI, tools=TOOLS, **COMMON).choices[0]
assert [call.function.name for call in called.message.tool_calls] == ["get_weather", "get_time"]
assert called.finish_reason == "tool_calls"
completion = litellm.text_completion(model="text-completion-openai/scripted", prompt="Let me", max_tokens=2, **COMMON)
assert completion.choices[0].text == " look.\n<tool_"
vectors = litellm.embedding(model="openai/scripted", input=["Hello"], api_base=BASE_URL, api_key=KEY)
assert len(vectors.data[0]["embedding"]) == 512
try:
    litellm.completion(model="openai/scripted", messages=HI, max_tokens=10**6, **COMMON)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("an answer beyond the context was promised")
