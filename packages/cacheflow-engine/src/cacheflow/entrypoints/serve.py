"""`cacheflow serve`: a subcommand per installed frontend, with the frontend's own options beside the engine's."""

from __future__ import annotations

import click

from cacheflow.entrypoints.launch import GROUP, PACKAGES, frontend_command
from cacheflow.plugins import find_plugins


class _Frontends(click.Group):
    """Knows the frontends by name and imports one when it is served."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(find_plugins(GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # One of ours that is not installed is asked for, too, so that the error can say which package brings it.
        installed = find_plugins(GROUP)
        if cmd_name not in PACKAGES and cmd_name not in installed:
            ctx.fail(f"There is no frontend {cmd_name!r}. Installed: {', '.join(installed) or 'none'}.")
        return frontend_command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, f"From {p[0].distribution} {p[0].version}.") for name, p in find_plugins(GROUP).items()]
        with formatter.section("Frontends"):
            formatter.write_dl(rows or [("none", f"In a clone of cacheflow: pip install ./packages/{PACKAGES['simple']}")])


@click.group(cls=_Frontends, subcommand_metavar="FRONTEND [OPTIONS]")
def serve() -> None:
    """Serve a model over HTTP with an installed frontend. `cacheflow serve FRONTEND --help` lists its options."""
