"""`cacheflow engine`: an engine without a frontend, for frontends in other processes (`--engine ADDRESS`)."""

from __future__ import annotations

import logging
from typing import Any

import click

from cacheflow.config import EngineConfig
from cacheflow.entrypoints.gone import refuse_gone_options
from cacheflow.entrypoints.options import build, options_from


@click.command()
@click.option(
    "--listen",
    "address",
    required=True,
    metavar="ADDRESS",
    help="Where frontends reach it: a path, ipc:///path, tcp://127.0.0.1:PORT, or with --engine-key tcp://HOST:PORT.",
)
@click.option(
    "--engine-key",
    "key_file",
    metavar="FILE",
    help="The key that frontends over TCP must have a copy of; made if the file is missing. Needed beyond this machine.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="How long running requests may go on after SIGTERM or Ctrl-C.",
)
@options_from(EngineConfig)
@refuse_gone_options
def engine(address: str, key_file: str | None, drain_timeout: float, **options: Any) -> None:
    """Run the engine alone, until SIGTERM or Ctrl-C; the model stays loaded while frontends come and go."""
    config = build(EngineConfig, options)
    from cacheflow.service.process import serve

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cacheflow").setLevel(logging.INFO)
    serve(config, address, key_file=key_file, drain_timeout_s=drain_timeout)
