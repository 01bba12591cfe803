"""From what a client sent to token ids that the model's context has room for. It knows no endpoint's fields.

Texts are tokenised and templates rendered here, before the engine hears of a request, so that one that is too long is
refused with OpenAI's `context_length_exceeded`. Long ones keep a thread busy rather than the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cacheflow.errors import InvalidRequestError
from cacheflow.text.chat_template import ChatTemplate
from cacheflow_openai.errors import ContextLengthError

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

LONG_TEXT = 20_000
"""Texts that have more characters together are tokenised in a thread."""


async def tokenise(engine: AsyncLLMServer, prompts: Sequence[str | list[int]], param: str = "prompt") -> list[list[int]]:
    """The token ids of each prompt; those that are ids already are taken as they are.

    Raises:
        ContextLengthError: A prompt is longer than the context.
        InvalidRequestError: A prompt is empty.
    """

    def work() -> list[list[int]]:
        return [_encode(engine, prompt, param) if isinstance(prompt, str) else prompt for prompt in prompts]

    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    all_ids = await asyncio.to_thread(work) if num_chars > LONG_TEXT else work()
    for ids in all_ids:
        if not ids:
            raise InvalidRequestError(f"{param} is empty. Give at least one token.", param=param)
    return all_ids


async def render(
    engine: AsyncLLMServer,
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    variables: dict[str, Any],
    param: str,
) -> list[int]:
    """The token ids of a conversation, written as the model's template has it.

    Raises:
        ContextLengthError: It is longer than the context.
        InvalidRequestError: The model has no template, or one that refuses these messages.
    """

    def work() -> list[int]:
        # The template writes a BOS token where the model wants one.
        return _encode(engine, template.render(messages, tools, variables), param, add_bos=False)

    ids = await asyncio.to_thread(work)
    if not ids:
        raise InvalidRequestError("The chat template makes an empty prompt of these messages.", param=param)
    return ids


def check_room(engine: AsyncLLMServer, num_prompt_tokens: int, max_tokens: int | None, param: str, limit_param: str) -> None:
    """Checks that prompt and answer fit into the context together.

    Args:
        engine: That serves the model.
        num_prompt_tokens: Of the prompt.
        max_tokens: Of the answer; None: what is left.
        param: The prompt's field.
        limit_param: The field of `max_tokens`.

    Raises:
        ContextLengthError: They don't.
    """
    room = engine.model_info.max_model_len - num_prompt_tokens
    if room < 1:
        raise _too_long(engine, f"{num_prompt_tokens} tokens", param)
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthError(
            f"This model's maximum context length is {engine.model_info.max_model_len} tokens; you asked for "
            f"{num_prompt_tokens + max_tokens} ({num_prompt_tokens} in {param}, {max_tokens} for {limit_param}). "
            f"Shorten {param}, or ask for at most {room}.",
            param=limit_param,
        )


def _encode(engine: AsyncLLMServer, text: str, param: str, add_bos: bool | None = None) -> list[int]:
    limit = engine.model_info.max_model_len
    # Tokenising takes seconds for megabytes, so a text that can't fit is refused by its bytes.
    if len(text.encode()) >= limit and (num_tokens := engine.tokenizer.min_tokens(text)) >= limit:
        raise _too_long(engine, f"at least {num_tokens} tokens", param)
    ids = engine.tokenizer.encode(text, add_bos) if text else []
    if len(ids) >= limit:
        raise _too_long(engine, f"{len(ids)} tokens", param)
    return ids


def _too_long(engine: AsyncLLMServer, length: str, param: str) -> ContextLengthError:
    return ContextLengthError(
        f"This model's maximum context length is {engine.model_info.max_model_len} tokens, of which at least one is left for "
        f"the answer; {param} has {length}. Shorten it.",
        param=param,
    )
