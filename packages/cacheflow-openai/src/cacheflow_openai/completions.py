"""Makes completion objects from the engine's outputs, whole or chunk by chunk. It knows no HTTP.

A whole answer is made as a stream's only chunk is, so both have the same texts, tokens and log probabilities.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from cacheflow.text import Tokenizer
from cacheflow.types import FINISH_LENGTH, CompletionOutput, RequestOutput
from cacheflow_openai.logprobs import TokenLog, by_id
from cacheflow_openai.models import fingerprint
from cacheflow_openai.outputs import has_deltas, outputs_of, usage_of
from cacheflow_openai.prompts import check_room, tokenise
from cacheflow_openai.schema import CompletionRequest

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer


async def complete(engine: AsyncLLMServer, request: CompletionRequest, model: str, request_id: str) -> dict[str, Any]:
    """The whole answer as one object.

    Raises:
        CacheflowError: A prompt can't be served, or failed.
    """
    prompts = await _prompts(engine, request)
    finals = {n: output async for n, output in outputs_of(engine, prompts, request.params, request.cache_salt, request_id)}
    answer = _Answer(engine, request, model, request_id)
    chunks = [chunk for number in sorted(finals) for chunk in answer.choices(number, finals[number])]
    return {**answer.head, "choices": chunks, "usage": answer.usage()}


async def stream(
    engine: AsyncLLMServer, request: CompletionRequest, model: str, request_id: str
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in chunks of the same kind: one per sequence that has grown, then the token counts if they are asked for.

    Raises:
        CacheflowError: A prompt can't be served, or failed.
    """
    answer = _Answer(engine, request, model, request_id)
    usage = {"usage": None} if request.include_usage else {}
    prompts = await _prompts(engine, request)
    async with aclosing(outputs_of(engine, prompts, request.params, request.cache_salt, request_id)) as outputs:
        async for number, output in outputs:
            if has_deltas(request.params) or output.finished:
                for choice in answer.choices(number, output):
                    yield {**answer.head, "choices": [choice], **usage}
    if request.include_usage:
        yield {**answer.head, "choices": [], "usage": answer.usage()}


async def _prompts(engine: AsyncLLMServer, request: CompletionRequest) -> list[list[int]]:
    prompts = await tokenise(engine, request.prompts)
    for prompt in prompts:
        check_room(engine, len(prompt), None if request.is_score_only else request.params.max_tokens, "prompt", "max_tokens")
    return prompts


class _Answer:
    """One answer in the making: what its chunks share, and how much of each choice has been written."""

    def __init__(self, engine: AsyncLLMServer, request: CompletionRequest, model: str, request_id: str) -> None:
        self.head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint(engine.model_info),
        }
        self._tokenizer = engine.tokenizer
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
        """The tokens of all prompts, and of all sequences that were generated."""
        usage = usage_of(self._latest.values())
        if self._request.is_score_only:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage


class _Choice:
    """One sequence of the answer, and how much of it has been written."""

    def __init__(
        self, tokenizer: Tokenizer, request: CompletionRequest, index: int, prompt: str | list[int], output: RequestOutput
    ) -> None:
        skip_special, prompt_ids = request.params.skip_special_tokens, output.prompt_token_ids
        self._tokenizer = tokenizer
        self._request = request
        self._index = index
        # Its text is known, or seldom wanted: nobody is to wait for it who only waits for the first token.
        is_wanted = request.echo or request.params.logprobs is not None
        self._prompt = prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids, skip_special) if is_wanted else ""
        self._log = TokenLog(tokenizer, tokenizer.detokenizer(skip_special, context=prompt_ids), offset=len(self._prompt))
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
                prompt_log = TokenLog(self._tokenizer, self._tokenizer.detokenizer(request.params.skip_special_tokens))
                before = prompt_log.write(output.prompt_token_ids, output.prompt_logprobs or [])
                logprobs = {name: before[name] + logprobs[name] for name in before}
            if request.prompt_logprobs:
                choice["prompt_logprobs"] = [by_id(self._tokenizer, entry) for entry in output.prompt_logprobs or []]
        choice["logprobs"] = logprobs
        return [choice]
