"""The `cacheflow` command: its subcommands, and how an error of ours looks on a terminal.

Commands of other distributions (group `cacheflow.commands`) and everything heavy are imported when they are run, so that
`cacheflow --help` answers at once. What a subcommand does lives in `cacheflow.entrypoints`; this module only names it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

from cacheflow.errors import CacheflowError
from cacheflow.plugins import find_plugins, load_plugin

EXIT_INTERRUPTED = 130
"""What a shell reports for a process that ended on Ctrl-C."""

COMMANDS = {
    "generate": ("cacheflow.entrypoints.generate", "Generate texts for prompts, from the command line or a file."),
    "serve": ("cacheflow.entrypoints.serve", "Serve a model over HTTP with an installed frontend."),
    "engine": ("cacheflow.entrypoints.engine", "Run the engine alone, for frontends in other processes."),
    "top": ("cacheflow.entrypoints.top", "Watch a server in the terminal: KV blocks, requests, rates, latencies."),
    "bench": ("cacheflow.entrypoints.bench", "Measure the throughput of a model on this machine."),
    "plugins": ("cacheflow.entrypoints.plugins", "List the installed plugins, or check one against its contract."),
}
"""The engine's own subcommands: the module that defines each under its own name, and its line in the help."""


class _LazyGroup(click.Group):
    """Knows its commands by name and imports one when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *(name for name in find_plugins("cacheflow.commands") if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            found = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        elif cmd_name in find_plugins("cacheflow.commands"):
            found = load_plugin("cacheflow.commands", cmd_name)
        else:
            return None
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            if name in COMMANDS:
                rows.append((name, COMMANDS[name][1]))
            else:
                owners = " and ".join(f"{p.distribution} {p.version}" for p in find_plugins("cacheflow.commands")[name])
                rows.append((name, f"From {owners}; see `cacheflow {name} --help`."))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_LazyGroup)
@click.version_option(version("cacheflow-engine"), prog_name="cacheflow")
def cacheflow() -> None:
    """Serve and run large language models on a paged KV cache."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process: 0 on success, 1 on an error of ours, 2 on wrong usage, 130 after Ctrl-C."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        outcome: Any = cacheflow.main(
            args=None if arguments is None else list(arguments), prog_name="cacheflow", standalone_mode=False
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except CacheflowError as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Nothing more can be printed, not even by the interpreter as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return outcome if isinstance(outcome, int) else 0
