"""`cacheflow run-batch`: answers a file of requests as the server would, without one.

It owns the command's options and its progress bar. The files are `batch`'s, the answers the app's.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import click

from cacheflow.config import EngineConfig, flag_of
from cacheflow.entrypoints.options import build, options_from
from cacheflow_openai.batch import BatchOutput, Line, pending_lines, run_lines


@click.command("run-batch", context_settings={"show_default": True, "max_content_width": 100})
@click.argument("source", metavar="INPUT", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUTPUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--engine", metavar="ADDRESS", help="A running `cacheflow engine`. Default: start one.")
@click.option("--engine-key", metavar="FILE", help="A copy of that engine's --engine-key, for TCP.")
@click.option("--served-model-name", metavar="NAME", help="What requests call the model. Default: its name.")
@click.option("--max-concurrency", type=click.IntRange(1, 4096), default=256, help="Requests that the engine has at a time.")
@options_from(EngineConfig)
@click.pass_context
def run_batch(
    context: click.Context,
    /,
    source: Path,
    target: Path,
    engine: str | None,
    engine_key: str | None,
    served_model_name: str | None,
    max_concurrency: int,
    **values: Any,
) -> None:
    """Answer the requests of INPUT, one JSON object a line in the format of OpenAI's batches, into OUTPUT.

    Answers come in the order in which they are ready: tell them apart by custom_id. Each is on the disk before the progress bar
    counts it. Run the same command again after it was ended in any way, and it goes on with what has no answer yet.
    """
    config = build(EngineConfig, values)
    if engine is None and engine_key is not None:
        raise click.UsageError("--engine-key is for --engine tcp://HOST:PORT; an engine of this command's own needs none.")
    if engine is not None:
        for name in values:
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{flag_of(name)} is for a new engine; {engine} already has its own. Leave it out.")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    output = BatchOutput(target)
    try:
        lines = pending_lines(source, output.done)
        num_done = len(output.done)
        num_good = 0
        if lines:
            work = _run(source, lines, output, config, engine, engine_key, served_model_name, max_concurrency)
            num_good = asyncio.run(work)
    finally:
        output.close()
    earlier = f"; {num_done} were there already" if num_done else ""
    click.echo(f"{len(lines)} answers added to {target}, {len(lines) - num_good} of them errors{earlier}.", err=True)


async def _run(
    source: Path,
    lines: list[Line],
    output: BatchOutput,
    config: EngineConfig,
    engine_address: str | None,
    key_file: str | None,
    model_name: str | None,
    max_concurrency: int,
) -> int:
    """Starts or joins the engine; returns how many answers are good ones."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cacheflow import AsyncLLMServer
    from cacheflow_openai.app import OpenAIFrontend, OpenAIOptions

    options = OpenAIOptions(served_model_name=() if model_name is None else (model_name,))
    starting = (
        AsyncLLMServer.start(config) if engine_address is None else AsyncLLMServer.connect(engine_address, key_file=key_file)
    )
    num_good = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with await starting as server:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            num_done = len(output.done)
            bar = progress.add_task("Requests", total=num_done + len(lines), completed=num_done)

            def on_done(is_good: bool) -> None:
                nonlocal num_good
                num_good += is_good
                progress.advance(bar)

            await run_lines(
                OpenAIFrontend.create_app(server, options),
                source,
                lines,
                output,
                max_concurrency=max_concurrency,
                on_done=on_done,
                api_key=options.api_key[0] if options.api_key else None,
            )
    return num_good
