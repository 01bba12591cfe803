"""Talks to the OpenAI-compatible server with the package's old interface (pip install openai==0.28.1).

Start the server first: python -m cacheflow.entrypoints.openai.openai_frontend --model facebook/opt-125m
"""

from __future__ import annotations

import argparse

import openai


def main() -> None:
    """Completes a text at once and as it grows; chats, if the model was made for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="facebook/opt-125m")
    arguments = parser.parse_args()

    # Modify OpenAI's API key and API base to use CacheFlow's API server.
    openai.api_key = "EMPTY"
    openai.api_base = arguments.base_url

    print("Models:", [model["id"] for model in openai.Model.list()["data"]])

    completion = openai.Completion.create(model=arguments.model, prompt="San Francisco is a")
    print("Completion result:", completion)

    print("As it grows: ", end="")
    for chunk in openai.Completion.create(model=arguments.model, prompt="San Francisco is a", temperature=0, stream=True):
        print(chunk["choices"][0]["text"], end="", flush=True)
    print()

    try:
        answer = openai.ChatCompletion.create(
            model=arguments.model, messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=32
        )
        print("Answer:", answer["choices"][0]["message"]["content"])
    except openai.error.InvalidRequestError as error:
        print("No chat with this model:", error)


if __name__ == "__main__":
    main()
