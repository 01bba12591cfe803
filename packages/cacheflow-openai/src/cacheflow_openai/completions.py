"""Makes completion objects from the engine's outputs, whole or chunk by chunk. It knows no HTTP.

A whole answer is made as a stream's only chunk is, so both have the same texts, tokens and log probabilities.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cacheflow.errors import RequestFailedError
from cacheflow.text import Detokenizer, Tokenizer
from cacheflow.types import (
    FINISH_ABORT,
    FINISH_ERROR,
    FINISH_LENGTH,
    CompletionOutput,
    Logprobs,
    RequestOutput,
)
from cacheflow_openai.schema import CompletionRequest

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

IMPOSSIBLE = -9999.0
"""What OpenAI writes for minus infinity, which JSON doesn't have."""


async def complete(engine: AsyncLLMServer, request: CompletionRequest, model: str) -> dict[str, Any]:
    """The whole answer as one object.

    Raises:
        CacheflowError: A prompt can't be served, or failed.
    """
    finals = {number: output async for number, output in _outputs(engine, request)}
    answer = _Answer(engine.tokenizer, request, model)
    chunks = [chunk for number in sorted(finals) for chunk in answer.choices(number, finals[number])]
    return {**answer.head, "choices": chunks, "usage": answer.usage()}


async def stream(engine: AsyncLLMServer, request: CompletionRequest, model: str) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in chunks of the same kind: one per sequence that has grown, then the token counts if they are asked for.

    Raises:
        CacheflowError: A prompt can't be served, or failed.
    """
    answer = _Answer(engine.tokenizer, request, model)
    usage = {"usage": None} if request.include_usage else {}
    async with aclosing(_outputs(engine, request)) as outputs:
        async for number, output in outputs:
            if request.has_deltas or output.finished:
                for choice in answer.choices(number, output):
                    yield {**answer.head, "choices": [choice], **usage}
    if request.include_usage:
        yield {**answer.head, "choices": [], "usage": answer.usage()}


async def _outputs(engine: AsyncLLMServer, request: CompletionRequest) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of all prompts as they come, each with its prompt's number. The first failure ends all."""
    # One slot: a client that reads slowly holds the prompts up rather than letting outputs pile up here.
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue(maxsize=1)

    async def feed(number: int, prompt: str | list[int]) -> None:
        try:
            async with aclosing(engine.generate(prompt, request.params, cache_salt=request.cache_salt)) as outputs:
                async for output in outputs:
                    await queue.put((number, output))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.ensure_future(feed(number, prompt)) for number, prompt in enumerate(request.prompts)]
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


def _check(output: RequestOutput) -> None:
    if output.error is not None:
        raise RequestFailedError(output.error)
    if any(sequence.finish_reason in (FINISH_ABORT, FINISH_ERROR) for sequence in output.outputs):
        raise RequestFailedError("The request was aborted before it was complete. Send it again.")


class _Answer:
    """One answer in the making: what its chunks share, and how much of each choice has been written."""

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest, model: str) -> None:
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._request = request
        self._choices: dict[int, _Choice] = {}
        self._latest: dict[int, RequestOutput] = {}

    def choices(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What the choices of the prompt `number` have gained; nothing for those that have gained nothing."""
        self._latest[number] = output
        gained = []
        for rank, sequence in enumerate(output.outputs):
            index = number * self._request.params.n + rank
            if index not in self._choices:
                self._choices[index] = _Choice(self._tokenizer, self._request, index, self._request.prompts[number], output)
            gained += self._choices[index].advance(output, sequence)
        return gained

    def usage(self) -> dict[str, Any]:
        """The tokens that all prompts and all returned sequences have."""
        outputs = self._latest.values()
        num_prompt = sum(len(o.prompt_token_ids) for o in outputs)
        num_generated = 0 if self._request.is_score_only else sum(len(s.token_ids) for o in outputs for s in o.outputs)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in outputs)},
        }


class _Choice:
    """One sequence of the answer, and how much of it has been written."""

    def __init__(
        self, tokenizer: Tokenizer, request: CompletionRequest, index: int, prompt: str | list[int], output: RequestOutput
    ) -> None:
        skip_special, prompt_ids = request.params.skip_special_tokens, output.prompt_token_ids
        self._tokenizer = tokenizer
        self._request = request
        self._index = index
        self._prompt = prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids, skip_special)
        self._log = _TokenLog(tokenizer, tokenizer.detokenizer(skip_special, context=prompt_ids), offset=len(self._prompt))
        self._num_chars = 0
        self._num_tokens = 0
        self._has_begun = False
        self._has_ended = False

    def advance(self, output: RequestOutput, sequence: CompletionOutput) -> list[dict[str, Any]]:
        """What `sequence` has more than was written before, as one choice object; an empty list if that is nothing."""
        if self._has_ended:
            return []
        request = self._request
        text, ids = sequence.text[self._num_chars :], sequence.token_ids[self._num_tokens :]
        entries = (sequence.logprobs or [])[self._num_tokens :]
        self._num_chars, self._num_tokens = len(sequence.text), len(sequence.token_ids)
        finish_reason = sequence.finish_reason
        self._has_ended = finish_reason is not None
        if request.is_score_only:
            text, ids, entries, finish_reason = "", [], [], finish_reason and FINISH_LENGTH
        wants_logprobs = request.params.logprobs is not None
        if not (text or finish_reason or (ids and (wants_logprobs or not self._has_begun))):
            return []
        choice: dict[str, Any] = {"index": self._index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        logprobs = self._log.write(ids, entries) if wants_logprobs else None
        if not self._has_begun:
            self._has_begun = True
            if request.echo:
                choice["text"] = self._prompt + text
            if request.echo and logprobs is not None:
                prompt_log = _TokenLog(self._tokenizer, self._tokenizer.detokenizer(request.params.skip_special_tokens))
                before = prompt_log.write(output.prompt_token_ids, output.prompt_logprobs or [])
                logprobs = {name: before[name] + logprobs[name] for name in before}
            if request.prompt_logprobs:
                choice["prompt_logprobs"] = [self._log.by_id(entry) for entry in output.prompt_logprobs or []]
        choice["logprobs"] = logprobs
        return [choice]


class _TokenLog:
    """Writes tokens with their log probabilities in OpenAI's lists.

    Args:
        tokenizer: The model's.
        detokenizer: A fresh one, to know where in the text each token begins.
        offset: Characters before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, detokenizer: Detokenizer, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._offset = offset

    def write(self, token_ids: Sequence[int], entries: Sequence[Logprobs | None]) -> dict[str, list[Any]]:
        """The lists for the next tokens."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            lists["tokens"].append(_name(self._tokenizer, token_id))
            start, self._offset = self._offset, self._offset + len(self._detokenizer.add(token_id))
            # A token that follows half a character brings that one's replacement with it.
            lists["text_offset"].append(max(start, self._offset - len(self._tokenizer.token_text(token_id))))
            lists["token_logprobs"].append(None if entry is None else max(entry[token_id], IMPOSSIBLE))
            lists["top_logprobs"].append(None if entry is None else self._by_name(entry))
        return lists

    def by_id(self, entry: Logprobs | None) -> dict[str, dict[str, Any]] | None:
        """An entry with token ids as keys, which unlike their texts are unique."""
        if entry is None:
            return None
        return {
            str(token_id): {"logprob": max(logprob, IMPOSSIBLE), "decoded_token": _name(self._tokenizer, token_id)}
            for token_id, logprob in entry.items()
        }

    def _by_name(self, entry: Logprobs) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, logprob in entry.items():
            # The chosen token comes first, and keeps its value should another one have the same text.
            named.setdefault(_name(self._tokenizer, token_id), max(logprob, IMPOSSIBLE))
        return named


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text, or its bytes where they are no whole character: so that different tokens have different names."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in _token_bytes(tokenizer)[token_id])


@lru_cache(maxsize=1)
def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    return tokenizer.token_bytes()
