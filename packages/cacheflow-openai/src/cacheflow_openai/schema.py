"""What `POST /v1/completions` accepts. It knows no HTTP and no engine.

The fields are OpenAI's, and beside them every field of `SamplingParams` and `cache_salt`. A null stands for the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cacheflow.asgi import sampling_params
from cacheflow.errors import InvalidRequestError
from cacheflow.types import SamplingParams
from cacheflow_openai.fields import check_stop, flag, given, ignored, include_usage, sampling_fields, string, texts_or_ids

MAX_PROMPTS = 128
"""Most prompts of one request."""
OWN_FIELDS = ("model", "prompt", "suffix", "echo", "stream", "stream_options", "user", "cache_salt")
"""Those beside the sampling parameters. `user` changes nothing."""


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request for completions.

    Attributes:
        model: The model's name as the client knows it. None: whatever is served.
        prompts: Each text or token ids; at least one.
        params: Of every prompt.
        echo: Whether each text begins with its prompt.
        is_score_only: Nothing is to be generated (max_tokens 0 with echo); `params` makes one token, which is not shown.
        prompt_logprobs: Whether the answer lists the prompts' log probabilities in the form of `SamplingParams`.
        stream: Whether texts are sent as they grow.
        include_usage: Whether a stream ends with the token counts.
        cache_salt: Cached prompts are shared only under equal salts.
        ignored: Names of fields that mean nothing here.
    """

    model: str | None
    prompts: list[str | list[int]]
    params: SamplingParams
    echo: bool
    is_score_only: bool
    prompt_logprobs: bool
    stream: bool
    include_usage: bool
    cache_salt: str
    ignored: list[str]


def parse(document: dict[str, Any]) -> CompletionRequest:
    """Checks a request's fields.

    Raises:
        InvalidRequestError: Naming the first field that is missing or out of its range.
    """
    values = given(document)
    if values.get("suffix"):
        raise InvalidRequestError("suffix is not supported: this model completes texts at their end only.", param="suffix")
    check_stop(values)
    echo, stream = flag(values, "echo"), flag(values, "stream")
    sampling = sampling_fields(values)
    # `type`: a false must be refused like any other value that is no number.
    is_score_only = type(sampling.get("max_tokens")) is int and sampling["max_tokens"] == 0
    if is_score_only and not echo:
        raise InvalidRequestError("max_tokens must be at least 1, or 0 together with echo.", param="max_tokens")
    if is_score_only:
        sampling["max_tokens"] = 1
    wants_prompt_logprobs = "prompt_logprobs" in sampling
    if echo and "logprobs" in sampling:
        if wants_prompt_logprobs:
            raise InvalidRequestError(
                "With echo, logprobs covers the prompt: leave prompt_logprobs out.", param="prompt_logprobs"
            )
        sampling["prompt_logprobs"] = sampling["logprobs"]
    return CompletionRequest(
        model=string(values, "model"),
        prompts=texts_or_ids(values, "prompt", MAX_PROMPTS),
        params=sampling_params(sampling),
        echo=echo,
        is_score_only=is_score_only,
        prompt_logprobs=wants_prompt_logprobs,
        stream=stream,
        include_usage=include_usage(values, stream),
        cache_salt=string(values, "cache_salt") or "",
        ignored=ignored(document, OWN_FIELDS),
    )
