"""The sampling parameters as options of a command, and what they parsed back into parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import click

from cacheflow.config import flag_of
from cacheflow.types import SAMPLING_FIELDS, SamplingParams, sampling_texts

OFF_THE_COMMAND_LINE = ("seed", "logit_bias", "allowed_token_ids", "prompt_logprobs", "extra")
"""Sampling parameters that only an input line can set; `--seed` is the engine's, where requests' seeds come from."""


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds one option per field of `SamplingParams`, with the help of its docstring."""
    texts = sampling_texts()
    for entry in reversed(fields(SamplingParams)):
        if entry.name not in OFF_THE_COMMAND_LINE:
            command = _sampling_option(entry, texts.get(entry.name))(command)
    return command


def _sampling_option(entry: Field[Any], text: str | None) -> Callable[[Any], Any]:
    flag, kind = flag_of(entry.name), str(entry.type)
    settings: dict[str, Any] = {
        "help": text,
        "default": entry.default,
        "show_default": not (entry.default is None or entry.default is False),
    }
    if entry.name == "early_stopping":
        return click.option(flag, type=click.Choice(["true", "false", "never"]), help=text, default="false", show_default=True)
    if kind == "bool":
        return click.option(f"{flag}/--no-{flag[2:]}" if entry.default else flag, is_flag=True, **settings)
    if kind.startswith("Sequence"):
        assert entry.default is not MISSING
        settings.update(multiple=True, show_default=False, help=f"{text} Give the option once for each.")
    return click.option(flag, type=int if "int" in kind else float if "float" in kind else str, **settings)


def sampling_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says of them.

    Raises:
        click.UsageError: --structured is no JSON.
    """
    values = {name: options[name] for name in SAMPLING_FIELDS if name in options and name not in OFF_THE_COMMAND_LINE}
    values["early_stopping"] = {"true": True, "false": False, "never": "never"}[values["early_stopping"]]
    if values["structured"] is not None:
        try:
            values["structured"] = json.loads(values["structured"])
        except ValueError as error:
            raise click.UsageError(f'--structured takes JSON, such as \'{{"regex": "[0-9]+"}}\': {error}.') from error
    return values
