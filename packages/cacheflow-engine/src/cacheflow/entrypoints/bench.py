"""`cacheflow bench`: offline throughput of a model, on a workload from a file or of random tokens, as JSON lines.

The repository's `benchmarks/` measure the same way, with its workloads, beside other engines and the machine's roofline. This
command needs nothing but the package. It knows `LLM` and nothing below it.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from cacheflow.config import EngineConfig
from cacheflow.entrypoints.gone import refuse_gone_options
from cacheflow.entrypoints.options import build, options_from
from cacheflow.errors import ConfigError, RequestFailedError
from cacheflow.types import SamplingParams

PACKAGES = ("cacheflow-engine", "torch")


def read_workload(path: Path) -> list[tuple[str | list[int], int]]:
    """A line a request: `{"prompt": text or token ids, "out": number of tokens}`.

    Raises:
        ConfigError: The file can't be read, or a line is something else.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [(entry["prompt"], int(entry["out"])) for entry in map(json.loads, lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'--workload {path}: each line must be like {{"prompt": "text, or a list of token ids", "out": 16}} ({error!r}).'
        ) from error
    if not found:
        raise ConfigError(f"--workload {path} holds no requests.")
    return found


@click.command("bench")
@click.option("--workload", type=click.Path(path_type=Path), help='JSON lines {"prompt": text or token ids, "out": n}.')
@click.option("--num-requests", type=click.IntRange(1), default=64, show_default=True, help="Without a file: how many.")
@click.option(
    "--input-len", type=click.IntRange(1), default=128, show_default=True, help="Without a file: random prompt tokens."
)
@click.option(
    "--output-len", type=click.IntRange(1), default=128, show_default=True, help="Without a file: output tokens of each."
)
@click.option(
    "--n", "num_samples", type=click.IntRange(1), default=1, show_default=True, help="Outputs of each; above 1 random."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often everything runs.")
@click.option("--output", type=click.Path(path_type=Path), help="A file to append the JSON lines to.")
@options_from(EngineConfig)
@refuse_gone_options
def bench(
    workload: Path | None,
    num_requests: int,
    input_len: int,
    output_len: int,
    num_samples: int,
    rounds: int,
    output: Path | None,
    **options: Any,
) -> None:
    """Measure offline throughput: all requests at once, greedy, past the end of text. Loading and a warm-up are not timed.

    Prefix caching is off, so that no round finds the prompts of an earlier one, unless --enable-prefix-caching asks for it.
    """
    source = click.get_current_context().get_parameter_source("enable_prefix_caching")
    if source is click.core.ParameterSource.DEFAULT:
        options["enable_prefix_caching"] = False
    config = build(EngineConfig, options)
    given = read_workload(workload) if workload is not None else None
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cacheflow").setLevel(logging.INFO)
    from cacheflow.llm import LLM

    llm = LLM(**{entry.name: getattr(config, entry.name) for entry in fields(config)})
    try:
        if given is None:
            numbers, size = random.Random(config.seed), llm.model_info.vocab_size
            given = [([numbers.randrange(size) for _ in range(input_len)], output_len) for _ in range(num_requests)]
        prompts = [llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt, _ in given]
        temperature = 0.0 if num_samples == 1 else 0.8
        params = [SamplingParams(n=num_samples, temperature=temperature, max_tokens=n, ignore_eos=True) for _, n in given]
        llm.generate(prompt_token_ids=prompts[:1], sampling_params=SamplingParams(max_tokens=4), use_tqdm=False)
        rates = []
        for number in range(rounds):
            start_s = time.perf_counter()
            results = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
            elapsed_s = time.perf_counter() - start_s
            failed = [result.error for result in results if result.error]
            if failed:
                raise RequestFailedError(f"{len(failed)} of {len(results)} requests failed: {failed[0]}")
            num_output_tokens = sum(len(completion.token_ids) for result in results for completion in result.outputs)
            line = {
                "benchmark": "bench",
                "model": config.model,
                "workload": None if workload is None else workload.name,
                "round": number,
                "num_requests": len(results),
                "num_prompt_tokens": sum(map(len, prompts)),
                "num_output_tokens": num_output_tokens,
                "elapsed_s": round(elapsed_s, 4),
                "versions": {name: version(name) for name in PACKAGES},
            }
            click.echo(json.dumps(line))
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            rates.append(num_output_tokens / elapsed_s)
        click.echo(
            f"{statistics.median(rates):.1f} output tokens/s, {min(rates):.1f} to {max(rates):.1f} in {rounds} rounds", err=True
        )
    finally:
        llm.close()
