"""Options of a command, made from a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cacheflow.config import EngineConfig, option, validate_options
from cacheflow.entrypoints.options import build, options_from


@dataclass(frozen=True, kw_only=True)
class Some:
    num_things: int = option(3, "How many.", minimum=1, maximum=9, unit="things", flags=("-nt",))
    share: float | None = option(None, "Which part.")
    kind: str = option("a", "Which kind.", choices=("a", "b"))
    is_quiet: bool = option(False, "No words.")
    has_color: bool = option(True, "Colours.")
    names: tuple[str, ...] = option((), "Which ones.")
    internal: int = 5

    def __post_init__(self) -> None:
        validate_options(self)


def invoke(*arguments: str, names: tuple[str, ...] | None = None) -> Result:
    @click.command()
    @options_from(Some, names)
    def command(**values: Any) -> None:
        click.echo(repr(build(Some, values)))

    return CliRunner().invoke(command, arguments)


def test_without_arguments_the_defaults_hold() -> None:
    assert invoke().output.strip() == repr(Some())


def test_every_kind_of_field_is_parsed() -> None:
    result = invoke("-nt", "7", "--share", "0.5", "--kind", "b", "--is-quiet", "--no-has-color")
    assert result.output.strip() == repr(Some(num_things=7, share=0.5, kind="b", is_quiet=True, has_color=False))


@pytest.mark.parametrize("value", ["a,b", " a , b,", '["a", "b"]'])
def test_a_list_is_json_or_separated_by_commas(value: str) -> None:
    assert invoke("--names", value).output.strip() == repr(Some(names=("a", "b")))


@pytest.mark.parametrize("value", ['["a"', "[1]"])
def test_a_list_that_is_none_is_a_usage_error(value: str) -> None:
    result = invoke("--names", value)
    assert result.exit_code == 2
    assert "--names" in result.output


def test_a_value_out_of_range_is_a_usage_error_with_the_range() -> None:
    result = invoke("--num-things", "10")
    assert result.exit_code == 2
    assert "--num-things must be from 1 to 9 things, got 10." in result.output


def test_only_the_named_fields_become_options() -> None:
    help_text = invoke("--help", names=("kind",)).output
    assert "--kind [a|b]" in help_text
    assert "--share" not in help_text


def test_the_help_has_defaults_and_units() -> None:
    help_text = invoke("--help").output
    assert "-nt, --num-things things" in help_text
    assert "[default: 3]" in help_text
    assert "--internal" not in help_text


def test_a_finished_command_takes_options_in_the_order_of_the_fields() -> None:
    command = options_from(EngineConfig)(click.Command("x"))
    assert [parameter.name for parameter in command.params][:2] == ["model", "tokenizer"]
