"""Writes tokens with their log probabilities, in the two forms that OpenAI has: lists for texts, objects for chats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cacheflow.text import Detokenizer, Tokenizer
from cacheflow.types import Logprobs

IMPOSSIBLE = -9999.0
"""What OpenAI writes for minus infinity, which JSON doesn't have."""


class TokenLog:
    """The lists of one text, written part by part.

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
            lists["tokens"].append(name_of(self._tokenizer, token_id))
            start, self._offset = self._offset, self._offset + len(self._detokenizer.add(token_id))
            # A token that follows half a character brings that one's replacement with it.
            lists["text_offset"].append(max(start, self._offset - len(self._tokenizer.token_text(token_id))))
            lists["token_logprobs"].append(None if entry is None else max(entry[token_id], IMPOSSIBLE))
            lists["top_logprobs"].append(None if entry is None else self._by_name(entry))
        return lists

    def _by_name(self, entry: Logprobs) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, logprob in entry.items():
            # The chosen token comes first, and keeps its value should another one have the same text.
            named.setdefault(name_of(self._tokenizer, token_id), max(logprob, IMPOSSIBLE))
        return named


def by_id(tokenizer: Tokenizer, entry: Logprobs | None) -> dict[str, dict[str, Any]] | None:
    """An entry with token ids as keys, which unlike their texts are unique."""
    if entry is None:
        return None
    return {
        str(token_id): {"logprob": max(logprob, IMPOSSIBLE), "decoded_token": name_of(tokenizer, token_id)}
        for token_id, logprob in entry.items()
    }


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[Logprobs], num_top: int
) -> list[dict[str, Any]]:
    """An object for each token, as chat answers have them.

    Its `top_logprobs` has the `num_top` most likely tokens, best first, and the chosen one as a further one where it is none of
    them; it is empty if `num_top` is 0.
    """

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = _token_bytes(tokenizer)[token_id]
        return {"token": name_of(tokenizer, token_id), "logprob": max(logprob, IMPOSSIBLE), "bytes": list(data)}

    objects = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        # Sorting keeps the order of equals, in which the chosen token comes first.
        top = sorted(entry.items(), key=lambda item: -item[1]) if num_top else []
        objects.append({**token(token_id, entry[token_id]), "top_logprobs": [token(*item) for item in top]})
    return objects


def name_of(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text, or its bytes where they are no whole character: so that different tokens have different names."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in _token_bytes(tokenizer)[token_id])


@lru_cache(maxsize=1)
def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    return tokenizer.token_bytes()
