"""`POST /v1/embeddings`: what it accepts, and the objects it answers with. It knows no HTTP.

A text's embedding is the mean of the model's last hidden states over its tokens, or that of its last token, scaled to length 1.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cacheflow.errors import InvalidRequestError
from cacheflow_openai.fields import choice, given, string, texts_or_ids
from cacheflow_openai.outputs import names_of
from cacheflow_openai.prompts import tokenise

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

MAX_INPUTS = 2048
"""OpenAI's limit."""
MAX_AT_ONCE = 32
"""Most inputs of one request that the engine has at a time."""
OWN_FIELDS = ("model", "input", "encoding_format", "dimensions", "pooling", "cache_salt", "user")


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """A request for embeddings.

    Attributes:
        model: The model's name as the client knows it. None: whatever is served.
        inputs: Each text or token ids; at least one.
        pooling: Of which hidden states.
        is_base64: Whether vectors are told as base64 of little-endian float32 rather than as lists.
        cache_salt: Cached prompts are shared only under equal salts.
        ignored: Names of fields that mean nothing here.
    """

    model: str | None
    inputs: list[str | list[int]]
    pooling: Literal["mean", "last"]
    is_base64: bool
    cache_salt: str
    ignored: list[str]


def parse_embedding(document: Mapping[str, Any]) -> EmbeddingRequest:
    """Checks a request's fields.

    Raises:
        InvalidRequestError: Naming the first field that is missing or out of its range.
    """
    values = given(document)
    if "dimensions" in values:
        raise InvalidRequestError(
            "dimensions is not supported: a shorter vector means something only for models trained for it.", param="dimensions"
        )
    pooling: Literal["mean", "last"] = "last" if choice(values, "pooling", ("mean", "last"), "mean") == "last" else "mean"
    return EmbeddingRequest(
        model=string(values, "model"),
        inputs=texts_or_ids(values, "input", MAX_INPUTS),
        pooling=pooling,
        is_base64=choice(values, "encoding_format", ("float", "base64"), "float") == "base64",
        cache_salt=string(values, "cache_salt") or "",
        ignored=[name for name in document if name not in OWN_FIELDS],
    )


async def embed(engine: AsyncLLMServer, request: EmbeddingRequest, model: str, request_id: str) -> dict[str, Any]:
    """The embeddings of all inputs, in their order.

    Raises:
        CacheflowError: An input can't be served, or failed.
    """
    inputs = await tokenise(engine, request.inputs, "input")
    turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def one(name: str, ids: list[int]) -> list[float]:
        async with turns:
            output = await engine.embed(ids, name, pooling=request.pooling, cache_salt=request.cache_salt)
            return output.embedding

    tasks = [asyncio.ensure_future(one(name, ids)) for name, ids in zip(names_of(request_id, len(inputs)), inputs, strict=True)]
    try:
        vectors = await asyncio.gather(*tasks)
    finally:
        # The first failure ends all, and so does a client that goes.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    num_tokens = sum(map(len, inputs))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector) if request.is_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _encoded(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
