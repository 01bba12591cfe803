"""Makes chat completion objects from the engine's outputs, whole or chunk by chunk. It knows no HTTP.

A whole message is made of the same deltas as a stream, so both have the same texts, calls and log probabilities.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cacheflow.errors import InvalidRequestError
from cacheflow.text import Tokenizer
from cacheflow.text.chat_template import ChatTemplate
from cacheflow.types import FINISH_STOP, CompletionOutput, RequestOutput
from cacheflow_openai.chat_schema import ChatRequest
from cacheflow_openai.fields import structure_errors_named
from cacheflow_openai.logprobs import chat_logprobs
from cacheflow_openai.models import fingerprint
from cacheflow_openai.outputs import has_deltas, outputs_of, usage_of
from cacheflow_openai.prompts import check_room, render
from cacheflow_openai.tool_calls import BEGIN, CallDelta, Parsed, ToolCallParser, new_call_id

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer


@dataclass
class Delta:
    """What a message has gained.

    Attributes:
        index: Of the choice.
        content: More text.
        calls: What tool calls have gained.
        logprobs: One object for each further token.
        finish_reason: On the last delta of the choice, else None.
    """

    index: int
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class ChatRun:
    """One request on its way: the deltas as they come, and the token counts so far.

    Args:
        engine: That serves it.
        template: The model's.
        request: The request.
        request_id: What the engine's log knows it as.
    """

    def __init__(self, engine: AsyncLLMServer, template: ChatTemplate, request: ChatRequest, request_id: str) -> None:
        self._engine = engine
        self._template = template
        self._request = request
        self._request_id = request_id
        self._latest: RequestOutput | None = None

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What each choice gains, as it gains it.

        Raises:
            CacheflowError: The messages can't be served, or the request failed.
        """
        request, engine, template = self._request, self._engine, self._template
        if request.tools and not template.has_tools:
            raise InvalidRequestError(
                "This model was not made to call tools: its chat template has no place for them. Leave tools out, set "
                "tool_choice to none, or have the answer in a response_format.",
                param="tools",
            )
        ids = await render(engine, template, request.messages, request.tools, request.template_variables, request.prompt_param)
        check_room(engine, len(ids), request.params.max_tokens, request.prompt_param, request.limit_param)
        is_marked = BEGIN in (template.source or "")
        choices = [_Choice(engine.tokenizer, request, index, is_marked) for index in range(request.params.n)]
        outputs = outputs_of(engine, [ids], request.params, request.cache_salt, self._request_id)
        with structure_errors_named(request.structure_param):
            async with aclosing(outputs):
                async for _, output in outputs:
                    self._latest = output
                    if has_deltas(request.params) or output.finished:
                        for choice, sequence in zip(choices, output.outputs, strict=True):
                            delta = choice.advance(sequence)
                            if delta is not None:
                                yield delta

    def usage(self) -> dict[str, Any]:
        """The tokens of the prompt and of all sequences."""
        return usage_of([] if self._latest is None else [self._latest])


async def complete(
    engine: AsyncLLMServer, template: ChatTemplate, request: ChatRequest, model: str, request_id: str
) -> dict[str, Any]:
    """The whole answer as one object.

    Raises:
        CacheflowError: The messages can't be served, or the request failed.
    """
    run = ChatRun(engine, template, request, request_id)
    messages = [Message() for _ in range(request.params.n)]
    async for delta in run.deltas():
        messages[delta.index].add(delta)
    choices = [
        {
            "index": index,
            "message": message.document(),
            "logprobs": None if request.top_logprobs is None else {"content": message.logprobs, "refusal": None},
            "finish_reason": message.finish_reason,
        }
        for index, message in enumerate(messages)
    ]
    return {**_head("chat.completion", engine, model, request_id), "choices": choices, "usage": run.usage()}


async def stream(
    engine: AsyncLLMServer, template: ChatTemplate, request: ChatRequest, model: str, request_id: str
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in chunks: each choice begins with its role and ends with an empty one that says why.

    Raises:
        CacheflowError: The messages can't be served, or the request failed.
    """
    head = _head("chat.completion.chunk", engine, model, request_id)
    usage = {"usage": None} if request.include_usage else {}

    def chunk(delta: Delta, gained: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = {"content": delta.logprobs, "refusal": None} if delta.logprobs else None
        delta.logprobs = []
        choice = {"index": delta.index, "delta": gained, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**head, "choices": [choice], **usage}

    run = ChatRun(engine, template, request, request_id)
    begun: set[int] = set()
    async with aclosing(run.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in begun:
                begun.add(delta.index)
                yield chunk(Delta(delta.index), {"role": "assistant", "content": ""})
            if delta.content:
                yield chunk(delta, {"content": delta.content})
            if delta.calls:
                yield chunk(delta, {"tool_calls": [_call_chunk(call) for call in delta.calls]})
            if delta.finish_reason is not None:
                yield chunk(delta, {}, delta.finish_reason)
    if request.include_usage:
        yield {**head, "choices": [], "usage": run.usage()}


class Message:
    """A message put together from its deltas."""

    def __init__(self) -> None:
        self.content = ""
        self.calls: list[CallDelta] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Takes the next delta."""
        self.content += delta.content
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        for call in delta.calls:
            if call.index == len(self.calls):
                self.calls.append(call)
            else:
                before = self.calls[call.index]
                self.calls[call.index] = CallDelta(call.index, before.arguments + call.arguments, before.id, before.name)

    def document(self) -> dict[str, Any]:
        """OpenAI's object: without text it has no content, and without calls no `tool_calls`."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message["content"] = self.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class _Choice:
    """One sequence of the answer, and how much of it has been told."""

    def __init__(self, tokenizer: Tokenizer, request: ChatRequest, index: int, is_marked: bool) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._index = index
        self._num_chars = 0
        self._num_tokens = 0
        self._num_calls = 0
        self._logprobs: list[dict[str, Any]] = []  # Of tokens whose text is held back.
        self._is_finished = False
        mode = request.tool_choice.mode
        self._parser = ToolCallParser(is_marked and mode == "auto", request.max_calls) if mode in ("auto", "required") else None

    def advance(self, sequence: CompletionOutput) -> Delta | None:
        """What `sequence` has more than was told before; None if that is nothing."""
        if self._is_finished:
            return None
        text, self._num_chars = sequence.text[self._num_chars :], len(sequence.text)
        self._log(sequence)
        self._is_finished = sequence.finish_reason is not None
        parsed = self._parse(text)
        if not (parsed.content or parsed.calls or self._is_finished):
            return None
        self._num_calls += len(parsed.calls)
        reason = sequence.finish_reason
        # OpenAI: "stop" where the client said which tool is to be called.
        if reason == FINISH_STOP and self._num_calls and self._request.tool_choice.mode != "named":
            reason = "tool_calls"
        logprobs, self._logprobs = self._logprobs, []
        return Delta(self._index, parsed.content, parsed.calls, logprobs, reason)

    def _parse(self, text: str) -> Parsed:
        if self._request.tool_choice.mode == "named":
            is_first = not self._num_calls and (bool(text) or self._is_finished)
            name = {"id": new_call_id(), "name": self._request.tool_choice.name} if is_first else {}
            return Parsed(calls=[CallDelta(0, text, **name)] if text or is_first else [])
        if self._parser is None:
            return Parsed(text)
        parsed = self._parser.feed(text)
        if self._is_finished:
            last = self._parser.finish()
            parsed = Parsed(parsed.content + last.content, parsed.calls + last.calls)
        return parsed

    def _log(self, sequence: CompletionOutput) -> None:
        if self._request.top_logprobs is None:
            return
        start, end = self._num_tokens, len(sequence.token_ids)
        self._num_tokens = end
        # The token that ends a message is no part of its text.
        end -= sequence.finish_reason == FINISH_STOP and not isinstance(sequence.stop_reason, str)
        entries = (sequence.logprobs or [])[start:end]
        self._logprobs += chat_logprobs(self._tokenizer, sequence.token_ids[start:end], entries, self._request.top_logprobs)


def _call_chunk(call: CallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _head(kind: str, engine: AsyncLLMServer, model: str, request_id: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint(engine.model_info),
    }
