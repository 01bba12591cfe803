"""From the engine's update of an `embed` request to what its user gets. It knows neither the engine nor the prompt's text."""

from __future__ import annotations

import math

from cacheflow.errors import RequestFailedError
from cacheflow.types import EmbeddingOutput, EngineRequest, RequestUpdate


def embedding_output(request: EngineRequest, update: RequestUpdate, prompt: str | None, *, normalize: bool) -> EmbeddingOutput:
    """The vector of a request, of length 1 if `normalize`. One of only zeros stays as it is.

    Raises:
        InvalidRequestError: The engine refused the request.
        RequestFailedError: It failed, was aborted, or its vector is not made of numbers.
    """
    embedding = update.embedding
    if embedding is None:
        raise update.exception() or RequestFailedError(f"The request {request.request_id} was aborted.")
    square = sum(value * value for value in embedding)
    if not math.isfinite(square):
        raise RequestFailedError(
            "The prompt's hidden states are not numbers: the model overflowed. Try --dtype bfloat16 or float32, and check the "
            "checkpoint."
        )
    length = math.sqrt(square) if normalize else 1.0
    return EmbeddingOutput(
        request_id=request.request_id,
        prompt=prompt,
        prompt_token_ids=request.prompt_token_ids,
        embedding=[value / (length or 1.0) for value in embedding],
    )
