"""Talks to the simple server: one text, a text that grows, and four beams. Needs only the standard library.

Start the server first: python -m cacheflow.entrypoints.simple_fastapi_frontend
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


def generate(base_url: str, **fields: Any) -> list[str]:
    """Asks for the whole texts."""
    with urlopen(_request(base_url, fields)) as response:
        texts: list[str] = json.load(response)["text"]
        return texts


def stream(base_url: str, **fields: Any) -> Iterator[list[str]]:
    """Asks for the texts as they grow: JSON documents, each ended by a NUL byte, with all texts so far."""
    with urlopen(_request(base_url, {**fields, "stream": True})) as response:
        received = b""
        while part := response.read1(65536):
            *documents, received = (received + part).split(b"\0")
            for document in map(json.loads, documents):
                if "error" in document:
                    raise RuntimeError(document["error"]["message"])
                yield document["text"]


def _request(base_url: str, fields: dict[str, Any]) -> Request:
    return Request(f"{base_url}/generate", json.dumps(fields).encode(), {"content-type": "application/json"})


def main() -> None:
    """Runs the three requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8001")
    parser.add_argument("--prompt", default="San Francisco is a")
    arguments = parser.parse_args()

    print("A text:")
    print(generate(arguments.base_url, prompt=arguments.prompt, temperature=0, max_tokens=32)[0])

    print("\nAs it grows:")
    shown = ""
    for texts in stream(arguments.base_url, prompt=arguments.prompt, temperature=0.8, top_p=0.95, max_tokens=32):
        print(texts[0][len(shown) :], end="", flush=True)
        shown = texts[0]

    print("\n\nFour beams, best first:")
    for number, text in enumerate(
        generate(arguments.base_url, prompt=arguments.prompt, use_beam_search=True, n=4, temperature=0)
    ):
        print(f"{number}: {text!r}")


if __name__ == "__main__":
    try:
        main()
    except HTTPError as error:
        sys.exit(f"The server refused: {error.read().decode()}")
    except URLError as error:
        sys.exit(f"No server answers ({error.reason}). Start one, or name its address with --base-url.")
