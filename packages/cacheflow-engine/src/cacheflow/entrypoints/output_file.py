"""The output of `cacheflow generate`: one JSON line a request, in a file that a later run continues.

Each line is written and flushed as its request finishes, so that a run that was ended in any way loses at most what was still
being generated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from cacheflow.entrypoints.prompt_file import Prompt, run_of
from cacheflow.errors import ConfigError
from cacheflow.types import CompletionOutput, RequestOutput

LINE_START = '{"index": '
"""How every line of an output file begins; anything else there is not ours to change."""


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
