"""Drives the server with openai 0.28.1. Arguments: base URL, API key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import openai

openai.api_base, openai.api_key = sys.argv[1:]
HI = [{"role": "user", "content": "Hi"}]
GREETING = "Hello there 😀, how are you?"

assert [model["id"] for model in openai.Model.list()["data"]] == ["scripted"]
completion = openai.Completion.create(model="scripted", prompt="Let me", temperature=0, max_tokens=2)
assert completion["choices"][0]["text"] == " look.\n<tool_", completion
answer = openai.ChatCompletion.create(model="scripted", messages=HI, temperature=0)
assert answer["choices"][0]["message"]["content"] == GREETING
chunks = openai.ChatCompletion.create(model="scripted", messages=HI, temperature=0, stream=True)
assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == GREETING
assert len(openai.Embedding.create(model="scripted", input=["Hello"])["data"][0]["embedding"]) == 512


def refusal(call: Callable[[], Any], kind: Any) -> Any:
    """The error that a call ends with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("the request was taken")


bad = refusal(lambda: openai.Completion.create(model="scripted", prompt="x", best_of=0), openai.error.InvalidRequestError)
assert bad.param == "best_of"
openai.api_key = "wrong"
refusal(openai.Model.list, openai.error.AuthenticationError)
