"""Answers of `/generate`: from the engine's outputs to what is written to the wire, whole or as they grow.

A stream's last part is the whole answer. It knows no routes and no statuses.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cacheflow.asgi import encoded, send_stream
from cacheflow.errors import RequestFailedError
from cacheflow.text import Tokenizer
from cacheflow.types import CompletionOutput
from cacheflow_server.schema import GenerateRequest

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

IMPOSSIBLE = -9999.0
"""Stands for minus infinity, which JSON doesn't have."""


@dataclass(frozen=True)
class Answer:
    """Everything so far.

    Attributes:
        texts: The prompt with the text of each sequence.
        finish_reasons: Of each sequence, None while it runs.
        logprobs: Of each sequence, an entry per token; None when not asked for.
    """

    texts: list[str]
    finish_reasons: list[str | None]
    logprobs: list[list[dict[str, Any]]] | None

    def document(self) -> dict[str, Any]:
        """As the quickstart has it: only the texts, unless log probabilities were asked for."""
        return {"text": self.texts} if self.logprobs is None else {"text": self.texts, "logprobs": self.logprobs}


class AnswerStream(Response):
    """Sends answers as they grow, each with everything so far: as JSON documents that each end in a NUL byte, or as events.

    Server-sent events also have the finish reasons, and end with "[DONE]". An error in the middle is the last document.
    """

    def __init__(self, first: Answer, rest: AsyncGenerator[Answer, None], has_events: bool) -> None:
        self.has_events = has_events
        self.parts = encoded(first, rest, self._part, self._encode, b"data: [DONE]\n\n" if has_events else b"")
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the documents; ends the request when the client hangs up."""
        media_type = "text/event-stream; charset=utf-8" if self.has_events else "application/json"
        await send_stream(receive, send, self.parts, {"content-type": media_type, "cache-control": "no-cache"})

    def _part(self, answer: Answer) -> bytes:
        document = answer.document()
        return self._encode({**document, "finish_reasons": answer.finish_reasons} if self.has_events else document)

    def _encode(self, document: dict[str, Any]) -> bytes:
        if self.has_events:
            # ASCII only: some clients take U+2028 for the end of a line.
            return b"data: " + json.dumps(document).encode() + b"\n\n"
        return json.dumps(document, ensure_ascii=False).encode() + b"\0"


async def answers(engine: AsyncLLMServer, asked: GenerateRequest, request_id: str) -> AsyncGenerator[Answer, None]:
    """The answer so far, whenever it has grown.

    Raises:
        CacheflowError: The request can't be served, or failed.
    """
    prompt = asked.prompt if isinstance(asked.prompt, str) else None
    written: dict[int, list[dict[str, Any]]] = {}
    async with aclosing(engine.generate(asked.prompt, asked.params, request_id)) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise RequestFailedError(output.error)
            if prompt is None:
                prompt = engine.tokenizer.decode(output.prompt_token_ids)
            if not output.outputs:
                continue
            logprobs = None
            if asked.params.logprobs is not None:
                logprobs = [_logprobs(engine.tokenizer, s, written.setdefault(s.index, [])) for s in output.outputs]
            yield Answer(
                [prompt + sequence.text for sequence in output.outputs],
                [sequence.finish_reason for sequence in output.outputs],
                logprobs,
            )


async def last(parts: AsyncGenerator[Answer, None]) -> Answer:
    """The last one, which is the whole answer."""
    final = Answer([], [], None)
    async with aclosing(parts):
        async for so_far in parts:
            final = so_far
    return final


def _logprobs(tokenizer: Tokenizer, sequence: CompletionOutput, written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An entry per token, added to those of the sequence's earlier tokens."""
    entries = sequence.logprobs or []
    for token_id, entry in zip(sequence.token_ids[len(written) :], entries[len(written) :], strict=True):
        top: dict[str, float] = {}
        for other, logprob in entry.items():
            # The chosen token comes first, and keeps its value should another one have the same text.
            top.setdefault(tokenizer.token_text(other), max(logprob, IMPOSSIBLE))
        written.append({"token": tokenizer.token_text(token_id), "logprob": max(entry[token_id], IMPOSSIBLE), "top": top})
    return written
