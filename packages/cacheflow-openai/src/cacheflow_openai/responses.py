"""Makes response objects and the events of their streams from a chat's deltas. It knows no HTTP and keeps nothing."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from cacheflow.errors import CacheflowError
from cacheflow.text.chat_template import ChatTemplate
from cacheflow.types import FINISH_LENGTH
from cacheflow_openai.chat import ChatRun, Delta
from cacheflow_openai.responses_schema import ResponseRequest
from cacheflow_openai.tool_calls import CallDelta

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

Event = dict[str, Any]


async def respond(
    engine: AsyncLLMServer, template: ChatTemplate, request: ResponseRequest, model: str, request_id: str
) -> dict[str, Any]:
    """The whole response as one object.

    Raises:
        CacheflowError: The input can't be served, or the request failed.
    """
    run, response = ChatRun(engine, template, request.chat, request_id), _Response(request, model, request_id)
    async for delta in run.deltas():
        for _ in response.add(delta):
            pass
    return response.document(run.usage())


async def stream(
    engine: AsyncLLMServer, template: ChatTemplate, request: ResponseRequest, model: str, request_id: str
) -> AsyncGenerator[Event, None]:
    """The events of a response. A request that fails behind the first one ends with `response.failed`.

    Raises:
        CacheflowError: The input can't be served; no event was sent then.
    """
    run, response = ChatRun(engine, template, request.chat, request_id), _Response(request, model, request_id)
    number = 0

    def numbered(event: Event) -> Event:
        nonlocal number
        number += 1
        return {**event, "sequence_number": number - 1}

    async with aclosing(run.deltas()) as deltas:
        # The response is told of only when the engine has taken the request, so that a refusal has a status of its own.
        first = await anext(deltas)
        for kind in ("response.created", "response.in_progress"):
            yield numbered({"type": kind, "response": response.document()})
        for event in response.add(first):
            yield numbered(event)
        try:
            async for delta in deltas:
                for event in response.add(delta):
                    yield numbered(event)
        except CacheflowError as error:
            response.fail(str(error))
    document = response.document(run.usage())
    yield numbered({"type": f"response.{document['status']}", "response": document})


class _Response:
    """A response in the making."""

    def __init__(self, request: ResponseRequest, model: str, request_id: str) -> None:
        self._request = request
        self._model = model
        self._id = f"resp_{request_id}"
        self._created_at = int(time.time())
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._items: list[dict[str, Any]] = []
        self._is_open = False  # The last item.

    def add(self, delta: Delta) -> Iterator[Event]:
        """Takes the next delta; yields the events that tell of it."""
        # A message without a word is still a message; so is one whose last tokens have no text.
        is_last_word = delta.finish_reason is not None and (not self._items or (self._has_open_message and delta.logprobs))
        if delta.content or (is_last_word and not delta.calls):
            if not self._has_open_message:
                yield from self._close("completed")
                yield from self._open_message()
            yield self._add_text(delta)
        for call in delta.calls:
            if call.id is not None:
                yield from self._close("completed")
                yield self._open_call(call)
            if call.arguments:
                self._items[-1]["arguments"] += call.arguments
                yield self._about_item("response.function_call_arguments.delta", delta=call.arguments)
        if delta.finish_reason is not None:
            self._status = "incomplete" if delta.finish_reason == FINISH_LENGTH else "completed"
            yield from self._close(self._status)

    def fail(self, message: str) -> None:
        """The request has failed."""
        self._status, self._error = "failed", {"code": "server_error", "message": message}
        if self._is_open:
            self._items[-1]["status"] = "incomplete"

    def document(self, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """OpenAI's object as it stands."""
        chat, params = self._request.chat, self._request.chat.params
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": self._request.instructions,
            "max_output_tokens": params.max_tokens,
            "model": self._model,
            "output": [{**item} for item in self._items],
            "parallel_tool_calls": chat.max_calls > 1,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": self._request.text,
            "tool_choice": self._request.tool_choice,
            "tools": self._request.tools,
            "top_logprobs": chat.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "metadata": {},
        }

    @property
    def _has_open_message(self) -> bool:
        return self._is_open and self._items[-1]["type"] == "message"

    def _open_message(self) -> Iterator[Event]:
        item: dict[str, Any] = {
            "type": "message",
            "id": f"msg_{uuid.uuid4().hex}",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._items.append(item)
        self._is_open = True
        yield self._about_output("response.output_item.added", item={**item})
        item["content"] = [_text_part("", [])]
        yield self._about_item("response.content_part.added", content_index=0, part=_text_part("", []))

    def _add_text(self, delta: Delta) -> Event:
        part = self._items[-1]["content"][0]
        part["text"] += delta.content
        part["logprobs"] = part["logprobs"] + delta.logprobs
        return self._about_item("response.output_text.delta", content_index=0, delta=delta.content, logprobs=delta.logprobs)

    def _open_call(self, call: CallDelta) -> Event:
        item = {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        self._is_open = True
        return self._about_output("response.output_item.added", item={**item})

    def _close(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        item = self._items[-1]
        if item["type"] == "message":
            part = {**item["content"][0]}
            yield self._about_item("response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"])
            yield self._about_item("response.content_part.done", content_index=0, part=part)
        else:
            yield self._about_item("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        item["status"] = status
        self._is_open = False
        yield self._about_output("response.output_item.done", item={**item})

    def _about_output(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "output_index": len(self._items) - 1, **fields}

    def _about_item(self, kind: str, **fields: Any) -> Event:
        return self._about_output(kind, item_id=self._items[-1]["id"], **fields)


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
