"""Talks to the OpenAI-compatible server with OpenAI's own package (pip install openai).

Start the server first: python -m cacheflow.entrypoints.openai.openai_frontend --model facebook/opt-125m
"""

from __future__ import annotations

import argparse
import sys

from openai import APIConnectionError, OpenAI


def main() -> None:
    """Lists the models, then completes a text at once and as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="Default: the first that the server has.")
    arguments = parser.parse_args()

    client = OpenAI(api_key="EMPTY", base_url=arguments.base_url)
    models = [model.id for model in client.models.list()]
    print("Models:", models)
    model = arguments.model or models[0]

    completion = client.completions.create(model=model, prompt="San Francisco is a", max_tokens=32, n=2, logprobs=1)
    for choice in completion.choices:
        print(f"Completion {choice.index} ({choice.finish_reason}): {choice.text!r}")
    print("Usage:", completion.usage)

    print("As it grows: ", end="")
    for chunk in client.completions.create(model=model, prompt="San Francisco is a", max_tokens=32, temperature=0, stream=True):
        print(chunk.choices[0].text, end="", flush=True)
    print()

    # What OpenAI's API doesn't have goes into extra_body.
    beams = client.completions.create(
        model=model, prompt="San Francisco is a", n=4, temperature=0, extra_body={"use_beam_search": True}
    )
    for choice in beams.choices:
        print(f"Beam {choice.index}: {choice.text!r}")


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError as error:
        sys.exit(f"No server answers ({error}). Start one, or name its address with --base-url.")
