"""Talks to the OpenAI-compatible server with OpenAI's own package (pip install openai).

Start the server first: python -m cacheflow.entrypoints.openai.openai_frontend --model facebook/opt-125m
Chats need a model that was made for them, such as --model demo; tool calls one whose chat template knows tools.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from openai import APIConnectionError, BadRequestError, OpenAI

PROMPT = "San Francisco is a"
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def complete(client: OpenAI, model: str) -> None:
    """Completes a text at once, as it grows, and by beam search."""
    completion = client.completions.create(model=model, prompt=PROMPT, max_tokens=32, n=2, logprobs=1)
    for choice in completion.choices:
        print(f"Completion {choice.index} ({choice.finish_reason}): {choice.text!r}")
    print("Usage:", completion.usage)

    chunks = client.completions.create(model=model, prompt=PROMPT, max_tokens=32, temperature=0, stream=True)
    show_growing(chunk.choices[0].text for chunk in chunks)

    # What OpenAI's API doesn't have goes into extra_body.
    beams = client.completions.create(model=model, prompt=PROMPT, n=4, temperature=0, extra_body={"use_beam_search": True})
    for choice in beams.choices:
        print(f"Beam {choice.index}: {choice.text!r}")


def chat(client: OpenAI, model: str) -> None:
    """Asks a question and shows the answer as it grows."""
    chunks = client.chat.completions.create(
        model=model, messages=[QUESTION], max_completion_tokens=64, temperature=0, stream=True
    )
    show_growing(chunk.choices[0].delta.content or "" for chunk in chunks)


def call_tools(client: OpenAI, model: str) -> None:
    """Lets the model call a tool, and tells it the result."""
    messages = [QUESTION]
    answer = client.chat.completions.create(model=model, messages=messages, tools=[WEATHER], temperature=0)
    message = answer.choices[0].message
    for call in message.tool_calls or []:
        if call.type == "function":
            print(f"Tool call: {call.function.name}({call.function.arguments})")
            result = json.dumps({"weather": "sunny", "degrees": 21})
            messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    if message.tool_calls:
        message = (
            client.chat.completions.create(model=model, messages=messages, tools=[WEATHER], temperature=0).choices[0].message
        )
    print(f"Answer: {message.content!r}")


def embed(client: OpenAI, model: str) -> None:
    """Compares texts by their vectors, which have length 1."""
    texts = ["The weather is fine.", "It is sunny.", "def add(a, b):"]
    first, *others = [item.embedding for item in client.embeddings.create(model=model, input=texts).data]
    for text, vector in zip(texts[1:], others, strict=True):
        print(f"{texts[0]!r} and {text!r}: {sum(x * y for x, y in zip(first, vector, strict=True)):.3f}")


def show_growing(parts: Iterable[str]) -> None:
    """Prints a text part by part."""
    print("As it grows: ", end="")
    for part in parts:
        print(part, end="", flush=True)
    print()


def main() -> None:
    """Shows what the served model can do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--model", help="Default: the first that the server has.")
    arguments = parser.parse_args()

    client = OpenAI(api_key=arguments.api_key, base_url=arguments.base_url)
    models = [model.id for model in client.models.list()]
    print("Models:", models)
    model = arguments.model or models[0]
    complete(client, model)
    embed(client, model)
    for part in (chat, call_tools):
        try:
            part(client, model)
        except BadRequestError as error:
            print(f"Not with this model: {error.message}")


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError as error:
        sys.exit(f"No server answers ({error}). Start one, or name its address with --base-url.")
