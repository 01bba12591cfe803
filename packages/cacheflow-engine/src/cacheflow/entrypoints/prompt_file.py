"""The input of `cacheflow generate`: one prompt a line, as text or as JSON, each with its sampling parameters and its seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cacheflow.errors import ConfigError, InvalidRequestError, shown
from cacheflow.types import SAMPLING_FIELDS, SamplingParams


@dataclass(frozen=True)
class Prompt:
    """One line of input.

    Attributes:
        index: Its number among the input's prompts, from 0.
        text: The prompt; for token ids or an unreadable line what stands there.
        token_ids: Given instead of a text.
        id: The user's name for it.
        params: How to generate.
        error: Why it can't be used, or None.
    """

    index: int
    text: str | list[int]
    id: str | int | None = None
    params: SamplingParams | None = None
    error: str | None = None


def read_prompts(path: Path, defaults: Mapping[str, Any]) -> list[Prompt]:
    """Reads an input file: `.jsonl` has one object a line, any other file one prompt a line; empty lines don't count.

    A line that can't be used becomes a `Prompt` with an error, so that the others are not lost.

    Args:
        path: The file.
        defaults: Sampling parameters of lines that don't set them.

    Raises:
        ConfigError: The file can't be read, or two lines have the same id.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return [Prompt(i, line.rstrip("\r"), params=SamplingParams(**defaults)) for i, line in enumerate(lines)]
    prompts = [_parse_line(index, line, defaults) for index, line in enumerate(lines)]
    seen: set[str | int] = set()
    for prompt in prompts:
        if prompt.id is not None and prompt.id in seen:
            raise ConfigError(f"{path}: the id {prompt.id!r} is given to two prompts. Ids must be unique.")
        if prompt.id is not None:
            seen.add(prompt.id)
    return prompts


def _parse_line(index: int, line: str, defaults: Mapping[str, Any]) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Prompt(index, line, error=f"The line is not JSON: {error}")
    if not isinstance(entry, dict):
        return Prompt(index, line, error='The line must be an object such as {"prompt": "…"}.')
    prompt_id = entry.pop("id", None)
    if not isinstance(prompt_id, (str, int)):
        prompt_id = None if prompt_id is None else json.dumps(prompt_id)
    text = entry.pop("prompt", None)
    if text is None:
        text = entry.pop("prompt_token_ids", None)
    if not isinstance(text, (str, list)):
        return Prompt(
            index, line, prompt_id, error='The line needs a "prompt" (text) or "prompt_token_ids" (a list of token ids).'
        )
    try:
        return Prompt(index, text, prompt_id, _line_params(entry, defaults))
    except InvalidRequestError as error:
        return Prompt(index, text, prompt_id, error=str(error))


def _line_params(entry: dict[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters of an input line, given beside the prompt or under "sampling_params"."""
    nested = entry.pop("sampling_params", None) or {}
    if not isinstance(nested, dict):
        raise InvalidRequestError(f"sampling_params must be an object, got {shown(nested)}.", param="sampling_params")
    values = {**entry, **nested}
    for name in values:
        if name not in SAMPLING_FIELDS:
            import difflib

            close = difflib.get_close_matches(name, SAMPLING_FIELDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " A line has a prompt, an id and sampling parameters."
            raise InvalidRequestError(f"Unknown field {name!r}.{hint}", param=name)
    bias = values.get("logit_bias")
    if isinstance(bias, dict) and all(isinstance(key, str) and key.isdecimal() for key in bias):
        values["logit_bias"] = {int(key): value for key, value in bias.items()}  # JSON has no other keys than strings
    return SamplingParams(**{**defaults, **values})


def with_seeds(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Gives a seed to each request that sets none: by its place in the input, so that a resumed run draws like an unbroken one.

    Args:
        prompts: The input.
        seed: Of the whole run. A prompt with an id keeps its seed when the input is put into another order.
    """
    seeded = []
    for prompt in prompts:
        if prompt.params is not None and prompt.params.seed is None:
            place = prompt.index if prompt.id is None else {"id": prompt.id}
            digest = hashlib.sha256(json.dumps([seed, place]).encode()).digest()
            own = int.from_bytes(digest[:8], "big") >> 1  # below 2**63
            prompt = replace(prompt, params=replace(prompt.params, seed=own))
        seeded.append(prompt)
    return seeded


def run_of(prompt: Prompt, model: str) -> str:
    """A short hash of the model's name and the request's sampling parameters: texts of another one are other texts."""
    params = None if prompt.params is None else asdict(prompt.params)
    return hashlib.sha256(json.dumps([model, params], sort_keys=True).encode()).hexdigest()[:12]
