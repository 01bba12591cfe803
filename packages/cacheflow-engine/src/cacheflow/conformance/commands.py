"""Conformance of `cacheflow.commands`: a click command that explains itself.

Runs no command but `--help`: what a command does is its own business.
"""

from __future__ import annotations

from typing import Any

from cacheflow.conformance.verdict import expect


def check_is_a_click_command(plugin: Any, name: str) -> None:
    """A member of the group is a `click.Command`."""
    import click

    expect(isinstance(plugin, click.Command), f"{name!r} must be a click.Command, got {type(plugin).__name__}")


def check_help_explains_it(plugin: Any, name: str) -> None:
    """`cacheflow NAME --help` ends with exit code 0 and every option has a help text."""
    import click
    from click.testing import CliRunner

    result = CliRunner().invoke(plugin, ["--help"], prog_name=f"cacheflow {name}")
    expect(
        result.exit_code == 0, f"`{name} --help` ends with exit code {result.exit_code}: {result.output or result.exception!r}"
    )
    expect(bool(plugin.help), f"{name!r} has no help text")
    for parameter in plugin.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            expect(bool(parameter.help), f"option {parameter.opts[0]} of {name!r} has no help text")


CHECKS = (check_is_a_click_command, check_help_explains_it)
