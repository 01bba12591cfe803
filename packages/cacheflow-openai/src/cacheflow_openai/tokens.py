"""`POST /tokenize` and `POST /detokenize`: text or messages to token ids as the model would see them, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cacheflow.errors import InvalidRequestError
from cacheflow.text.chat_template import ChatTemplate
from cacheflow_openai.chat_schema import parse_messages, parse_tools
from cacheflow_openai.fields import flag, given, is_ids
from cacheflow_openai.prompts import LONG_TEXT

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

TOKENIZE_FIELDS = ("model", "prompt", "messages", "tools", "add_special_tokens", "return_token_strs")
DETOKENIZE_FIELDS = ("model", "tokens", "skip_special_tokens")


async def tokenize(engine: AsyncLLMServer, template: ChatTemplate, document: Mapping[str, Any]) -> dict[str, Any]:
    """The token ids of `prompt`, or of `messages` written by the chat template. They may be more than the context holds.

    Raises:
        InvalidRequestError: There is not one of the two, or a field is out of its range.
    """
    values = given(document)
    if ("prompt" in values) == ("messages" in values):
        raise InvalidRequestError("Send either prompt or messages.", param="prompt")
    # None: as the model wants it. A template writes the BOS token itself.
    add_bos: bool | None = flag(values, "add_special_tokens") if "add_special_tokens" in values else None
    wants_texts = flag(values, "return_token_strs")

    def tokenized(text: str, add_bos: bool | None) -> dict[str, Any]:
        ids = engine.tokenizer.encode(text, add_bos)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": engine.model_info.max_model_len, "tokens": ids}
        if wants_texts:
            answer["token_strs"] = [engine.tokenizer.token_text(token_id) for token_id in ids]
        return answer

    if "messages" in values:
        messages, tools = parse_messages(values["messages"]), parse_tools(values.get("tools", []))
        return await asyncio.to_thread(lambda: tokenized(template.render(messages, tools), bool(add_bos)))
    text = values["prompt"]
    if not isinstance(text, str):
        raise InvalidRequestError("prompt must be a string.", param="prompt")
    return await asyncio.to_thread(tokenized, text, add_bos) if len(text) > LONG_TEXT else tokenized(text, add_bos)


async def detokenize(engine: AsyncLLMServer, document: Mapping[str, Any]) -> dict[str, Any]:
    """The text of `tokens`, special ones included unless `skip_special_tokens` is true.

    Raises:
        InvalidRequestError: They are no token ids of this model.
    """
    values = given(document)
    ids: Any = values.get("tokens")
    if not is_ids(ids):
        raise InvalidRequestError("tokens must be a list of token ids.", param="tokens")
    skip = flag(values, "skip_special_tokens")
    try:
        return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, ids, skip)}
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), param="tokens") from error
