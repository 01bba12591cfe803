"""`cacheflow generate`: prompts from the command line or a file, texts to the terminal or to a file that can be resumed.

Input files hold one prompt a line, as text or as JSON; output files one JSON line a request, written and flushed as each one
finishes, so that a run that was ended in any way loses at most what was still being generated. This module knows `LLM` and
nothing below it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from tqdm import tqdm

from cacheflow.config import EngineConfig, flag_of
from cacheflow.entrypoints.gone import refuse_gone_options
from cacheflow.entrypoints.options import build, options_from
from cacheflow.errors import ConfigError, InvalidRequestError
from cacheflow.types import SAMPLING_FIELDS, CompletionOutput, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_INTERRUPTED = 130
"""What a shell reports for a process that ended on Ctrl-C."""

LINE_START = '{"index": '
"""How every line of an output file begins; anything else there is not ours to change."""

OFF_THE_COMMAND_LINE = ("seed", "logit_bias", "allowed_token_ids", "prompt_logprobs", "extra")
"""Sampling parameters that only an input line can set; `--seed` is the engine's, where requests' seeds come from."""


@dataclass(frozen=True)
class Prompt:
    """One line of input.

    Attributes:
        index: Its number among the input's prompts, from 0.
        text: The prompt; for token ids or an unreadable line what stands there.
        token_ids: Given instead of a text.
        id: The user's name for it.
        params: How to generate.
        error: Why it can't be used, or None.
    """

    index: int
    text: str | list[int]
    id: str | int | None = None
    params: SamplingParams | None = None
    error: str | None = None


# --- Options ----------------------------------------------------------------------------------------------------------


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds one option per field of `SamplingParams`, with the help of its docstring."""
    texts = _attribute_texts(SamplingParams.__doc__ or "")
    for entry in reversed(fields(SamplingParams)):
        if entry.name not in OFF_THE_COMMAND_LINE:
            command = _sampling_option(entry, texts.get(entry.name))(command)
    return command


def _attribute_texts(docstring: str) -> dict[str, str]:
    """The entries of a Google docstring's Attributes section, each on one line."""
    texts: dict[str, str] = {}
    name = ""
    section = docstring.partition("Attributes:\n")[2].partition("\n\n")[0]
    for line in section.splitlines():
        if line.startswith(" " * 12):
            texts[name] += " " + line.strip()
        else:
            name, _, text = line.strip().partition(": ")
            texts[name] = text
    return texts


def _sampling_option(entry: Field[Any], text: str | None) -> Callable[[Any], Any]:
    flag, kind = flag_of(entry.name), str(entry.type)
    settings: dict[str, Any] = {
        "help": text,
        "default": entry.default,
        "show_default": not (entry.default is None or entry.default is False),
    }
    if entry.name == "early_stopping":
        return click.option(flag, type=click.Choice(["true", "false", "never"]), help=text, default="false", show_default=True)
    if kind == "bool":
        return click.option(f"{flag}/--no-{flag[2:]}" if entry.default else flag, is_flag=True, **settings)
    if kind.startswith("Sequence"):
        assert entry.default is not MISSING
        settings.update(multiple=True, show_default=False, help=f"{text} Give the option once for each.")
    return click.option(flag, type=int if "int" in kind else float if "float" in kind else str, **settings)


def _sampling_values(options: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: options[name] for name in SAMPLING_FIELDS if name in options and name not in OFF_THE_COMMAND_LINE}
    values["early_stopping"] = {"true": True, "false": False, "never": "never"}[values["early_stopping"]]
    if values["structured"] is not None:
        try:
            values["structured"] = json.loads(values["structured"])
        except ValueError as error:
            raise click.UsageError(f'--structured takes JSON, such as \'{{"regex": "[0-9]+"}}\': {error}.') from error
    return values


# --- Input ------------------------------------------------------------------------------------------------------------


def read_prompts(path: Path, defaults: Mapping[str, Any]) -> list[Prompt]:
    """Reads an input file: `.jsonl` has one object a line, any other file one prompt a line; empty lines don't count.

    A line that can't be used becomes a `Prompt` with an error, so that the others are not lost.

    Args:
        path: The file.
        defaults: Sampling parameters of lines that don't set them.

    Raises:
        ConfigError: The file can't be read, or two lines have the same id.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return [Prompt(i, line.rstrip("\r"), params=SamplingParams(**defaults)) for i, line in enumerate(lines)]
    prompts = [_parse_line(index, line, defaults) for index, line in enumerate(lines)]
    seen: set[str | int] = set()
    for prompt in prompts:
        if prompt.id is not None and prompt.id in seen:
            raise ConfigError(f"{path}: the id {prompt.id!r} is given to two prompts. Ids must be unique.")
        if prompt.id is not None:
            seen.add(prompt.id)
    return prompts


def _parse_line(index: int, line: str, defaults: Mapping[str, Any]) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Prompt(index, line, error=f"The line is not JSON: {error}")
    if not isinstance(entry, dict):
        return Prompt(index, line, error='The line must be an object such as {"prompt": "…"}.')
    prompt_id = entry.pop("id", None)
    if not isinstance(prompt_id, (str, int)):
        prompt_id = None if prompt_id is None else json.dumps(prompt_id)
    text = entry.pop("prompt", None)
    if text is None:
        text = entry.pop("prompt_token_ids", None)
    if not isinstance(text, (str, list)):
        return Prompt(
            index, line, prompt_id, error='The line needs a "prompt" (text) or "prompt_token_ids" (a list of token ids).'
        )
    try:
        return Prompt(index, text, prompt_id, _line_params(entry, defaults))
    except InvalidRequestError as error:
        return Prompt(index, text, prompt_id, error=str(error))


def _line_params(entry: dict[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters of an input line, given beside the prompt or under "sampling_params"."""
    nested = entry.pop("sampling_params", None) or {}
    if not isinstance(nested, dict):
        raise InvalidRequestError(f"sampling_params must be an object, got {json.dumps(nested)[:80]}.", param="sampling_params")
    values = {**entry, **nested}
    for name in values:
        if name not in SAMPLING_FIELDS:
            import difflib

            close = difflib.get_close_matches(name, SAMPLING_FIELDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " A line has a prompt, an id and sampling parameters."
            raise InvalidRequestError(f"Unknown field {name!r}.{hint}", param=name)
    bias = values.get("logit_bias")
    if isinstance(bias, dict) and all(isinstance(key, str) and key.isdecimal() for key in bias):
        values["logit_bias"] = {int(key): value for key, value in bias.items()}  # JSON has no other keys than strings
    return SamplingParams(**{**defaults, **values})


def with_seeds(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Gives a seed to each request that sets none: by its place in the input, so that a resumed run draws like an unbroken one.

    Args:
        prompts: The input.
        seed: Of the whole run. A prompt with an id keeps its seed when the input is put into another order.
    """
    seeded = []
    for prompt in prompts:
        if prompt.params is not None and prompt.params.seed is None:
            place = prompt.index if prompt.id is None else {"id": prompt.id}
            digest = hashlib.sha256(json.dumps([seed, place]).encode()).digest()
            own = int.from_bytes(digest[:8], "big") >> 1  # below 2**63
            prompt = replace(prompt, params=replace(prompt.params, seed=own))
        seeded.append(prompt)
    return seeded


def run_of(prompt: Prompt, model: str) -> str:
    """A short hash of the model's name and the request's sampling parameters: texts of another one are other texts."""
    params = None if prompt.params is None else asdict(prompt.params)
    return hashlib.sha256(json.dumps([model, params], sort_keys=True).encode()).hexdigest()[:12]


# --- Output -----------------------------------------------------------------------------------------------------------


class OutputFile:
    """A file of one JSON line per finished request, which a later run continues.

    Lines are matched by id where the input gives one, else by index, and must be for the same prompt, model and sampling
    parameters. Requests that failed are tried again. A last line that a kill tore off is dropped.

    Raises:
        ConfigError: The file holds something else than such lines, or lines for other prompts or of another run.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], model: str) -> None:
        self._path = path
        self._model = model
        self._by_id = {p.id: p for p in prompts if p.id is not None}
        self._by_index = {p.index: p for p in prompts}
        content = self._read()
        kept: list[str] = []
        self.done: set[int] = set()
        lines = content.split("\n")
        for number, line in enumerate(lines, 1):
            is_torn_off = number == len(lines)
            index = self._index_of(line, number, may_be_torn=is_torn_off) if line else None
            if index is not None and index not in self.done:
                self.done.add(index)
                kept.append(line + "\n")
        try:
            if "".join(kept) != content:
                self._replace(kept)
            # Half of a surrogate pair, which JSON can spell and UTF-8 can't, is written as JSON spells it.
            self._file: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"--output {path} can't be written: {error.strerror}.") from error

    def write(self, prompt: Prompt, output: RequestOutput | None, error: str | None) -> None:
        """Appends one line and hands it to the operating system, so that a kill can't take it back."""
        self._file.write(json.dumps(output_line(prompt, output, error, run_of(prompt, self._model)), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self) -> str:
        try:
            return self._path.read_bytes().decode("utf-8", errors="replace") if self._path.exists() else ""
        except OSError as error:
            raise ConfigError(f"--output {self._path} can't be read, to be continued: {error.strerror}.") from error

    def _index_of(self, line: str, number: int, may_be_torn: bool) -> int | None:
        """Which prompt a line answers; None when it is to be generated again."""
        start = line[: len(LINE_START)]
        is_ours = LINE_START.startswith(start) if may_be_torn else line.startswith(LINE_START)
        entry = None
        if is_ours:
            try:
                entry = json.loads(line)
            except ValueError:
                if may_be_torn:
                    return None
        if not isinstance(entry, dict) or "prompt" not in entry:
            raise ConfigError(
                f"{self._path} line {number} was not written by `cacheflow generate`, so the file is left as it is. "
                "Choose another --output."
            )
        if entry.get("error"):
            return None
        prompt = self._by_id.get(entry["id"]) if entry.get("id") is not None else self._by_index.get(entry["index"])
        if prompt is None or prompt.text != entry["prompt"]:
            raise ConfigError(
                f"{self._path} line {number} is for a prompt that the input does not have at that place, "
                "so the file is left as it is. Choose another --output, or delete it to start again."
            )
        if entry.get("run") != run_of(prompt, self._model):
            raise ConfigError(
                f"{self._path} line {number} was generated with another model, other sampling parameters or another --seed, "
                "so the file is left as it is. Choose another --output, or delete it to start again."
            )
        return prompt.index

    def _replace(self, lines: Sequence[str]) -> None:
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.write_text("".join(lines), encoding="utf-8")
        os.replace(fresh, self._path)


def output_line(prompt: Prompt, output: RequestOutput | None, error: str | None, run: str) -> dict[str, Any]:
    """What is written for one request; `index` comes first, as `LINE_START` says."""
    line: dict[str, Any] = {"index": prompt.index}
    if prompt.id is not None:
        line["id"] = prompt.id
    line["prompt"] = prompt.text
    line["run"] = run
    line["num_prompt_tokens"] = len(output.prompt_token_ids) if output else 0
    line["outputs"] = [_completion(c) for c in output.outputs] if output and not error else []
    if error:
        line["error"] = error
    return line


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_tokens": len(completion.token_ids),
        "cumulative_logprob": completion.cumulative_logprob,
    }
    if completion.logprobs is not None:
        entry["token_ids"] = completion.token_ids
        entry["logprobs"] = completion.logprobs
    return entry


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


# --- The run ----------------------------------------------------------------------------------------------------------


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
    defaults = _sampling_values(options)
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
