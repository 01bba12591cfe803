"""Makes an `EngineRequest` from what a user gave: tokens, limits and a seed, checked against the served model.

Pure: it knows the tokenizer and the model's numbers, and neither the engine nor how a request gets there.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from cacheflow.errors import InvalidRequestError
from cacheflow.text.structure import check_structure
from cacheflow.types import EngineRequest, ModelInfo, SamplingParams

if TYPE_CHECKING:
    from cacheflow.text.tokenizer import Tokenizer

MAX_ID_LENGTH = 256
"""Most characters of a request id, a client id or a cache salt."""
MAX_PRIORITY = 2**31 - 1


def make_request(
    info: ModelInfo,
    tokenizer: Tokenizer,
    prompt: str | None,
    prompt_token_ids: list[int] | None,
    params: SamplingParams | None,
    request_id: str,
    *,
    priority: int = 0,
    cache_salt: str = "",
    arrival_s: float | None = None,
    client_id: str = "",
    seeds: random.Random | None = None,
) -> EngineRequest:
    """Tokenises and checks; the result has a seed and a `max_tokens` that the context has room for.

    Args:
        info: The served model.
        tokenizer: Its tokenizer.
        prompt: The text; not looked at when there are token ids.
        prompt_token_ids: The tokens, taken as they are.
        params: None: the defaults.
        request_id: Unique among the client's unfinished requests.
        priority: Smaller is sooner, under the `priority` policy.
        cache_salt: Requests share cached blocks only under equal salts.
        arrival_s: Seconds since the epoch. None: now.
        client_id: Who asks.
        seeds: Where the seed comes from when `params` has none. None: the operating system.

    Raises:
        InvalidRequestError: The request can't be served by this model; `param` names the field.
    """
    params = params or SamplingParams()
    _check_names(request_id, cache_salt, client_id, priority)
    token_ids = _prompt_tokens(info, tokenizer, prompt, prompt_token_ids)
    if params.structured is not None:
        check_structure(params.structured)
    return EngineRequest(
        request_id=request_id,
        client_id=client_id,
        prompt_token_ids=token_ids,
        params=_fit_params(info, params, len(token_ids), seeds),
        arrival_s=time.time() if arrival_s is None else arrival_s,
        priority=priority,
        cache_salt=cache_salt,
    )


def make_embed_request(
    info: ModelInfo,
    tokenizer: Tokenizer,
    prompt: str | None,
    prompt_token_ids: list[int] | None,
    request_id: str,
    *,
    pooling: Literal["mean", "last"] = "mean",
    priority: int = 0,
    cache_salt: str = "",
    client_id: str = "",
) -> EngineRequest:
    """Like `make_request`, for a vector instead of a text. The prompt may fill the whole context.

    Raises:
        InvalidRequestError: The request can't be served by this model; `param` names the field.
    """
    _check_names(request_id, cache_salt, client_id, priority)
    if pooling not in ("mean", "last"):
        raise InvalidRequestError(f'pooling must be "mean" or "last", got {pooling!r}.', param="pooling")
    return EngineRequest(
        request_id=request_id,
        client_id=client_id,
        prompt_token_ids=_prompt_tokens(info, tokenizer, prompt, prompt_token_ids, num_output_tokens=0),
        params=SamplingParams(max_tokens=1, seed=0),
        arrival_s=time.time(),
        priority=priority,
        cache_salt=cache_salt,
        task="embed",
        pooling=pooling,
    )


def _check_names(request_id: str, cache_salt: str, client_id: str, priority: int) -> None:
    for name, value in (("request_id", request_id), ("cache_salt", cache_salt), ("client_id", client_id)):
        _check_name(name, value)
    if not request_id:
        raise InvalidRequestError("request_id must not be empty.", param="request_id")
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}, got {priority!r}.", param="priority"
        )


def _check_name(name: str, value: str) -> None:
    if not isinstance(value, str) or len(value) > MAX_ID_LENGTH:
        raise InvalidRequestError(f"{name} must be a string of at most {MAX_ID_LENGTH} characters.", param=name)
    _check_text(name, value)


def _check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no UTF-8 text can carry
        raise InvalidRequestError(
            f"{name} has a lone surrogate at character {error.start}, which is not valid Unicode text.", param=name
        ) from error


def _prompt_tokens(
    info: ModelInfo,
    tokenizer: Tokenizer,
    prompt: str | None,
    prompt_token_ids: list[int] | None,
    num_output_tokens: int = 1,
) -> list[int]:
    max_tokens = info.max_model_len - num_output_tokens
    if prompt_token_ids is not None:
        token_ids = list(prompt_token_ids)
        _check_length(info, len(token_ids), max_tokens)
        _check_token_ids("prompt", token_ids, info.vocab_size)
    elif isinstance(prompt, str):
        _check_text("prompt", prompt)
        # Tokenising takes seconds for megabytes, so a text that can't fit is refused by its bytes.
        num_bytes = len(prompt.encode())
        if num_bytes > max_tokens:
            _check_length(info, tokenizer.min_tokens(prompt), max_tokens, f" {num_bytes} bytes, which are at least")
        token_ids = tokenizer.encode(prompt) if prompt else []
        _check_length(info, len(token_ids), max_tokens)
    else:
        raise InvalidRequestError(f"A prompt must be text or a list of token ids, got {type(prompt).__name__}.", param="prompt")
    if not token_ids:
        raise InvalidRequestError("The prompt is empty. Give at least one token.", param="prompt")
    return token_ids


def _check_length(info: ModelInfo, num_tokens: int, max_tokens: int, qualifier: str = "") -> None:
    if num_tokens > max_tokens:
        rest = ", of which one is left for the output" if max_tokens < info.max_model_len else ""
        raise InvalidRequestError(
            f"The prompt has{qualifier} {num_tokens} tokens; {info.model} takes at most {max_tokens} "
            f"(a context of {info.max_model_len}{rest}). Shorten the prompt.",
            param="prompt",
        )


def _check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise InvalidRequestError(f"{name}[{position}] must be a token id, got {type(token_id).__name__}.", param=name)
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{name}[{position}] is {token_id}; the model's token ids go from 0 to {vocab_size - 1}.", param=name
            )


def _fit_params(info: ModelInfo, params: SamplingParams, num_prompt_tokens: int, seeds: random.Random | None) -> SamplingParams:
    if params.num_sequences > info.max_num_seqs:
        name = params.sequences_field
        raise InvalidRequestError(
            f"{name} is {params.num_sequences}, but the engine runs at most {info.max_num_seqs} sequences at a time. "
            f"Ask for fewer, or start the engine with a larger --max-num-seqs.",
            param=name,
        )
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        _check_token_ids(name, tuple(getattr(params, name) or ()), info.vocab_size)
    room = info.max_model_len - num_prompt_tokens
    if params.min_tokens > room:
        raise InvalidRequestError(
            f"min_tokens is {params.min_tokens}, but the context of {info.max_model_len} tokens has room for {room} "
            f"after a prompt of {num_prompt_tokens}.",
            param="min_tokens",
        )
    seed = params.seed
    if seed is None:
        seed = seeds.getrandbits(63) if seeds is not None else secrets.randbits(63)
    return replace(params, seed=seed, max_tokens=room if params.max_tokens is None else min(params.max_tokens, room))
