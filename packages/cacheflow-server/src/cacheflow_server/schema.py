"""What `POST /generate` accepts. A null stands for the default. It knows no HTTP and no engine."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from cacheflow.asgi import sampling_params
from cacheflow.errors import InvalidRequestError
from cacheflow.types import SAMPLING_FIELDS, SamplingParams

LOST_FIELDS = ("logprobs", "prompt_logprobs")
"""Sampling parameters whose results have no place in an answer that is texts."""
FIELDS = ("prompt", "stream", *(name for name in SAMPLING_FIELDS if name not in LOST_FIELDS))


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A request to `/generate`.

    Attributes:
        prompt: Text, or token ids.
        stream: Whether texts are sent as they grow.
        params: All other fields of the request.
    """

    prompt: str | list[int]
    stream: bool
    params: SamplingParams


def parse(document: dict[str, Any]) -> GenerateRequest:
    """Checks a request's fields.

    Raises:
        InvalidRequestError: Naming the first field that is unknown, missing or out of its range.
    """
    document = {name: value for name, value in document.items() if value is not None or name not in (*FIELDS, *LOST_FIELDS)}
    for name in document:
        if name in LOST_FIELDS:
            raise InvalidRequestError(
                f"{name} has no place in an answer of /generate. Leave it out, or use the OpenAI frontend: "
                "`cacheflow serve openai`, POST /v1/completions.",
                param=name,
            )
        if name not in FIELDS:
            close = difflib.get_close_matches(name[:64], FIELDS, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known fields: {', '.join(FIELDS)}."
            raise InvalidRequestError(f"Unknown field {name[:64]!r}. {hint}", param=name[:64])
    prompt, stream = document.get("prompt"), document.get("stream", False)
    # `type`, because a bool is an int too.
    if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(type(i) is int for i in prompt))):
        raise InvalidRequestError("prompt must be a string or a list of token ids.", param="prompt")
    if not isinstance(stream, bool):
        raise InvalidRequestError("stream must be true or false.", param="stream")
    params = sampling_params({name: value for name, value in document.items() if name in SAMPLING_FIELDS})
    return GenerateRequest(prompt=prompt, stream=stream, params=params)
