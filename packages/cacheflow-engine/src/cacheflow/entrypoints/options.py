"""Turns a dataclass of `cacheflow.config.option` fields into command-line options, and what they parsed back into it.

Every option is thus defined once, with its type, range, unit and help. This module knows no particular option.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click

from cacheflow.config import flag_of
from cacheflow.errors import ConfigError

Command = TypeVar("Command", bound="click.Command | Callable[..., Any]")
Options = TypeVar("Options")


def _names(value: str) -> tuple[str, ...]:
    """Parses a list of names: a JSON list, or separated by commas.

    Raises:
        click.BadParameter: It is neither.
    """
    if not value.strip().startswith("["):
        return tuple(name for part in value.split(",") if (name := part.strip()))
    try:
        entries = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no JSON list: {error}.") from error
    if not all(isinstance(entry, str) for entry in entries):
        raise click.BadParameter(f"{value!r} must be a list of strings.")
    return tuple(entries)


def _all_names(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """The names of an option that may be given several times."""
    return tuple(name for value in values for name in _names(value))


def options_from(dataclass_type: type[Any], names: Collection[str] | None = None) -> Callable[[Command], Command]:
    """A decorator that adds one option per field to a click command, or to a function that is to become one.

    A boolean that is False by default becomes a plain `--flag`; one that is True becomes `--flag/--no-flag`.

    Args:
        dataclass_type: Its `option()` fields are taken, in their order; fields of another kind are not.
        names: Only these fields. None: all.
    """
    types = get_type_hints(dataclass_type)
    chosen = [f for f in fields(dataclass_type) if "help" in f.metadata and (names is None or f.name in names)]
    decorators = [_option(entry, types[entry.name]) for entry in chosen]

    def decorate(command: Command) -> Command:
        # A command lists its options as they were added; a function's are read from the last decorator to the first.
        for add in decorators if isinstance(command, click.Command) else reversed(decorators):
            command = add(command)
        return command

    return decorate


def build(dataclass_type: type[Options], values: Mapping[str, Any]) -> Options:
    """Makes the dataclass from the keyword arguments of a click command; arguments that it has no field for are left alone.

    Raises:
        click.UsageError: A value out of range, or two that don't go together.
    """
    names = {entry.name for entry in fields(dataclass_type)}  # type: ignore[arg-type]
    try:
        return dataclass_type(**{name: value for name, value in values.items() if name in names})
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


def _option(entry: Field[Any], hint: Any) -> Callable[[Any], Any]:
    rules, flag = entry.metadata, flag_of(entry.name)
    # `int | None` parses as an int; leaving the option out is how None is said.
    kind = next((t for t in get_args(hint) if t is not type(None)), hint)
    is_list = get_origin(hint) is tuple
    if is_list:
        kind = str
    elif kind is bool:
        flag, kind = (f"{flag}/--no-{flag[2:]}" if entry.default else flag), None
    elif rules["choices"] is not None:
        kind = click.Choice(rules["choices"])
    return click.option(
        *rules["flags"],
        flag,
        entry.name,
        type=kind,
        is_flag=kind is None,
        default=entry.default,
        show_default=entry.default not in (None, (), "") and entry.default is not False,
        metavar="NAMES" if is_list else rules["unit"],
        multiple=is_list,
        callback=_all_names if is_list else None,
        help=rules["help"],
    )
