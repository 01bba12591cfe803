"""Options of the original CacheFlow that have no purpose here: each is refused with its reason.

See docs/decisions/007. This module knows none of the options that are there.
"""

from __future__ import annotations

import click

from cacheflow.entrypoints.options import Command

GONE = {
    "--use-np-weights": "safetensors files are memory-mapped, so copies as numpy files would save nothing",
    "--worker-use-ray": "how workers are run is chosen with --executor, by the name of an installed executor",
    "--engine-use-ray": "the engine has a process of its own, or runs elsewhere as `cacheflow engine`",
}


def refuse_gone_options(command: Command) -> Command:
    """Adds them to a command, out of its help, as usage errors."""
    for flag in GONE:
        command = click.option(flag, is_flag=True, hidden=True, expose_value=False, callback=_refuse)(command)
    return command


def _refuse(context: click.Context, parameter: click.Parameter, is_given: bool) -> None:
    if is_given:
        flag = parameter.opts[0]
        raise click.UsageError(f"There is no {flag} any more: {GONE[flag]}.")
