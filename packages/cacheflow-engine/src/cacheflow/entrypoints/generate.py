"""`cacheflow generate`: prompts from the command line or a file, texts to the terminal or to a file that can be resumed.

This module knows `LLM` and nothing below it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from cacheflow.config import EngineConfig
from cacheflow.entrypoints.gone import refuse_gone_options
from cacheflow.entrypoints.options import build, options_from
from cacheflow.entrypoints.output_file import OutputFile
from cacheflow.entrypoints.prompt_file import Prompt, read_prompts, with_seeds
from cacheflow.entrypoints.sampling_options import sampling_options, sampling_values
from cacheflow.errors import ConfigError, InvalidRequestError
from cacheflow.types import RequestOutput, SamplingParams

EXIT_INTERRUPTED = 130
"""What a shell reports for a process that ended on Ctrl-C."""


@click.command(
    "generate",
    epilog="Input lines ending in .jsonl are objects: "
    '{"prompt": "…", "id": "…", "temperature": 0.8, …}, sampling parameters also under "sampling_params".',
)
@click.argument("prompts", nargs=-1)
@click.option("--input", "input_path", type=click.Path(path_type=Path), help="Prompts: .jsonl, or text with one a line.")
@click.option("--output", "output_path", type=click.Path(path_type=Path), help="JSON lines; what is there is not done again.")
@sampling_options
@options_from(EngineConfig)
@refuse_gone_options
@click.pass_context
def generate(
    context: click.Context, /, prompts: tuple[str, ...], input_path: Path | None, output_path: Path | None, **options: Any
) -> None:
    """Generate texts for PROMPTS, or for the prompts in a file.

    Prints prompts, texts and the throughput. With --output each finished request is one JSON line; after a Ctrl-C or a kill
    the same command goes on where it ended. Ends with exit code 1 if any prompt failed, 130 after Ctrl-C.
    """
    if bool(prompts) == bool(input_path):
        hint = 'such as: cacheflow generate --model demo "The capital of France is"'
        raise click.UsageError(f"Give either prompts or --input FILE, {hint}")
    config = build(EngineConfig, options)
    defaults = sampling_values(options)
    try:
        common = SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise click.UsageError(str(error)) from error
    if input_path is not None:
        _check_paths(input_path, output_path)
        work = read_prompts(input_path, defaults)
        if not work:
            raise click.UsageError(f"--input {input_path} holds no prompts.")
    else:
        work = [Prompt(i, text, params=common) for i, text in enumerate(prompts)]
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cacheflow").setLevel(logging.INFO)
    context.exit(_run(with_seeds(work, config.seed), config, output_path))


def _check_paths(input_path: Path, output_path: Path | None) -> None:
    if not input_path.exists() or input_path.is_dir():
        raise ConfigError(f"--input {input_path}: there is no such file.")
    if output_path is not None and output_path.resolve() == input_path.resolve():
        raise ConfigError(f"--output {output_path} is the input file itself. Choose another name.")


@dataclass
class _Tally:
    """What a run has done so far."""

    num_finished: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    elapsed_s: float = 0.0

    def line(self) -> str:
        elapsed_s = max(self.elapsed_s, 1e-9)
        return (
            f"Throughput: {self.num_finished} requests, {self.num_prompt_tokens} prompt tokens, "
            f"{self.num_output_tokens} output tokens in {self.elapsed_s:.2f} s: "
            f"{self.num_finished / elapsed_s:.2f} requests/s, {self.num_output_tokens / elapsed_s:.1f} output tokens/s"
        )


def _run(prompts: Sequence[Prompt], config: EngineConfig, output_path: Path | None) -> int:
    """Generates what is not done yet, and returns the exit code."""
    sink = OutputFile(output_path, prompts, config.model) if output_path is not None else Terminal(prompts)
    if isinstance(sink, OutputFile) and sink.done:
        click.echo(f"{len(sink.done)} of {len(prompts)} requests are already in {output_path}.")
        prompts = [p for p in prompts if p.index not in sink.done]
    tally = _Tally()
    is_interrupted = False
    # Texts on the terminal are progress enough; lines in a file need a bar, where there is a terminal to show it.
    progress = tqdm(total=len(prompts), unit="request", disable=True if output_path is None else None)
    try:
        for prompt, output, error in _results(prompts, config, tally):
            sink.write(prompt, output, error)
            progress.update()
            if error:
                tally.num_failed += 1
                click.echo(f"Error: prompt {prompt.index} {_shown(prompt)}: {error}", err=True)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        progress.close()
        sink.close()
    if tally.num_finished:
        click.echo(tally.line())
    if is_interrupted:
        kept = f"{tally.num_finished} of {len(prompts)} requests had finished"
        where = f" and are in {output_path}; the same command does the rest" if output_path else ""
        click.echo(f"Interrupted: {kept}{where}.", err=True)
        return EXIT_INTERRUPTED
    return 1 if tally.num_failed else 0


def _results(
    prompts: Sequence[Prompt], config: EngineConfig, tally: _Tally
) -> Iterator[tuple[Prompt, RequestOutput | None, str | None]]:
    """Each prompt with its output or its error, as they finish."""
    for prompt in prompts:
        if prompt.error:
            yield prompt, None, prompt.error
    usable = [p for p in prompts if not p.error]
    if not usable:
        return
    from cacheflow.llm import LLM

    llm = LLM(**{entry.name: getattr(config, entry.name) for entry in fields(config)})
    try:
        start_s = time.perf_counter()
        texts = [p.text for p in usable]
        for number, output in llm.generate_iter(texts, [p.params or SamplingParams() for p in usable]):
            tally.elapsed_s = time.perf_counter() - start_s
            if output.error is None:
                tally.num_finished += 1
                tally.num_prompt_tokens += len(output.prompt_token_ids)
                tally.num_output_tokens += sum(len(c.token_ids) for c in output.outputs)
            yield usable[number], output, output.error
    finally:
        llm.close()


class Terminal:
    """Prints finished requests in the order of their prompts, holding back those that finish early."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._waiting = deque(p.index for p in prompts)
        self._held: dict[int, tuple[Prompt, RequestOutput | None, str | None]] = {}

    def write(self, prompt: Prompt, output: RequestOutput | None, error: str | None) -> None:
        """Prints it, and those that waited for it, once all prompts before it have been printed."""
        self._held[prompt.index] = (prompt, output, error)
        while self._waiting and self._waiting[0] in self._held:
            self._print(*self._held.pop(self._waiting.popleft()))

    def close(self) -> None:
        """Prints what still waits for a prompt that will not come any more."""
        for index in sorted(self._held):
            self._print(*self._held.pop(index))

    def _print(self, prompt: Prompt, output: RequestOutput | None, error: str | None) -> None:
        for completion in output.outputs if output and not error else ():
            click.echo(f"Prompt: {_shown(prompt)}, Generated text: {completion.text!r}")


def _shown(prompt: Prompt) -> str:
    shown = repr(prompt.text)
    return shown if len(shown) <= 200 else f"{shown[:197]}…"
