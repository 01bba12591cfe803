"""The engine's outputs of one or several prompts as they come, and the token counts of all. It knows no endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from cacheflow.errors import RequestFailedError
from cacheflow.types import FINISH_ABORT, FINISH_ERROR, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer


async def outputs_of(
    engine: AsyncLLMServer, prompts: Sequence[list[int]], params: SamplingParams, cache_salt: str, request_id: str
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of all prompts as they come, each with its prompt's number. The first failure ends all.

    Raises:
        CacheflowError: A prompt can't be served, or failed.
    """
    # One slot: a client that reads slowly holds the prompts up rather than letting outputs pile up here.
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue(maxsize=1)

    async def feed(number: int, name: str, prompt: list[int]) -> None:
        try:
            async with aclosing(engine.generate(prompt, params, name, cache_salt=cache_salt)) as outputs:
                async for output in outputs:
                    await queue.put((number, output))
        except Exception as error:
            await queue.put((number, error))

    names = names_of(request_id, len(prompts))
    tasks = [asyncio.ensure_future(feed(number, names[number], prompt)) for number, prompt in enumerate(prompts)]
    try:
        num_running = len(tasks)
        while num_running:
            number, output = await queue.get()
            if isinstance(output, Exception):
                raise output
            _check(output)
            num_running -= output.finished
            yield number, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def names_of(request_id: str, num_prompts: int) -> list[str]:
    """What the engine knows the prompts of a request as: its log tells which request they belong to."""
    return [request_id] if num_prompts == 1 else [f"{request_id}-{number}" for number in range(num_prompts)]


def has_deltas(params: SamplingParams) -> bool:
    """Whether the sequences that are generated are those that are returned, so that they can be shown as they grow."""
    return params.num_sequences == params.n and not params.use_beam_search


def usage_of(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """The tokens of all prompts and of all sequences that were generated, those that `best_of` left out among them."""
    outputs = list(outputs)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(output.num_generated_tokens for output in outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def _check(output: RequestOutput) -> None:
    if output.error is not None:
        raise RequestFailedError(output.error)
    if any(sequence.finish_reason in (FINISH_ABORT, FINISH_ERROR) for sequence in output.outputs):
        raise RequestFailedError("The request was aborted before it was complete. Send it again.")
