"""`cacheflow plugins` and `cacheflow plugins check`: the commands around the table and the conformance suites."""

from __future__ import annotations

import click

from cacheflow.entrypoints.plugin_table import check_plugin, plugin_statuses, print_json, print_table


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
@click.pass_context
def plugins(context: click.Context, as_json: bool) -> None:
    """List the installed plugins of every group: name, distribution, version, status, and why one can't be used here."""
    if context.invoked_subcommand is None:
        rows = list(plugin_statuses())
        print_json(rows) if as_json else print_table(rows)


@plugins.command()
@click.argument("name")
@click.option("--group", help="Only this group, such as attention_backends. Default: all that have the name.")
@click.pass_context
def check(context: click.Context, name: str, group: str | None) -> None:
    """Run the conformance suite of its group on the installed plugin NAME; exit code 1 if a check fails."""
    context.exit(0 if check_plugin(name, group) else 1)
