"""Writes into the documentation what the code declares: models, plugins, options, sampling parameters, example files.

A page marks the place of a table with `<!-- table: NAME -->` and `<!-- end of table -->`, that of a file with
`<!-- file: PATH -->` and `<!-- end of file -->`. Run it with `./run tables`; with `--check` it changes nothing and fails when
a page is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cacheflow import SamplingParams
from cacheflow.config import EngineConfig, flag_of
from cacheflow.metrics import COUNTERS, ENGINE_COUNTERS, ENGINE_GAUGES, ENGINE_UP, HISTOGRAMS, PREFIX
from cacheflow.plugins import GROUPS, find_plugins, load_plugin
from cacheflow.types import sampling_texts

DOCS = Path(__file__).parent
OURS = ("cacheflow-engine", "cacheflow-kernels", "cacheflow-openai", "cacheflow-server")
PLACE = re.compile(r"(<!-- (table|file): (\S+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def summary(value: Any) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")


def members(group: str, *, by_module: bool = False) -> str:
    """The built-in members of one group, each with the summary of its class, or of the module that it has to itself."""
    rows = []
    for name, claims in find_plugins(group).items():
        if claims[0].distribution in OURS:
            plugin = load_plugin(group, name)
            text = summary(sys.modules[plugin.__module__] if by_module else plugin)
            rows.append((f"`{name}`", text, claims[0].distribution))
    return table(("name", "what it is", "package"), rows)


def groups() -> str:
    """All plugin groups, with their built-in members."""
    rows = []
    for group, purpose in GROUPS.items():
        names = [name for name, claims in find_plugins(group).items() if claims[0].distribution in OURS]
        page = f"[{group}]({group.removeprefix('cacheflow.').replace('_', '-')}.md)"
        rows.append((page, purpose, ", ".join(f"`{name}`" for name in names) or "none"))
    return table(("group", "what its members are", "built in"), rows)


def options(dataclass_type: type[Any]) -> str:
    """The `cacheflow.config.option` fields of a dataclass, as command-line options."""
    rows = []
    for entry in fields(dataclass_type):
        names = ", ".join(f"`{flag}`" for flag in (flag_of(entry.name), *entry.metadata["flags"]))
        value = ", ".join(entry.default) if isinstance(entry.default, tuple) else entry.default
        default = "" if value in (None, "") else f"`{value}`"
        choices = entry.metadata["choices"]
        text = entry.metadata["help"] + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")
        rows.append((names, default, entry.metadata["unit"] or "", text))
    return table(("option", "default", "unit", "meaning"), rows)


def sampling_parameters() -> str:
    """The fields of `SamplingParams`, with the words of its docstring."""
    texts, rows = sampling_texts(), []
    for entry in fields(SamplingParams):
        default = entry.default if entry.default_factory is not dict else {}
        rows.append((f"`{entry.name}`", f"`{default}`", texts[entry.name]))
    return table(("parameter", "default", "meaning"), rows)


def metrics() -> str:
    """Every metric that a server exposes, with the suffix that Prometheus' format gives to counters."""
    rows = []
    for name, (text, _) in HISTOGRAMS.items():
        rows.append((f"`{PREFIX}{name}`", "histogram", text))
    for name, (text, label) in COUNTERS.items():
        rows.append((f"`{PREFIX}{name}_total`", f"counter by `{label}`", text))
    rows.append((f"`{PREFIX}engine_up`", "gauge", ENGINE_UP))
    rows += [(f"`{PREFIX}{name}`", "gauge", text) for name, text in ENGINE_GAUGES.items()]
    rows += [(f"`{PREFIX}{name}_total`", "counter", text) for name, text in ENGINE_COUNTERS.items()]
    return table(("metric", "kind", "meaning"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "models": lambda: members("cacheflow.models", by_module=True),
    "weight-loaders": lambda: members("cacheflow.weight_loaders", by_module=True),
    "schedulers": lambda: members("cacheflow.schedulers"),
    "logits-processors": lambda: members("cacheflow.logits_processors"),
    "groups": groups,
    "engine-options": lambda: options(EngineConfig),
    "simple-options": lambda: options(load_plugin("cacheflow.frontends", "simple").options),
    "openai-options": lambda: options(load_plugin("cacheflow.frontends", "openai").options),
    "sampling-parameters": sampling_parameters,
    "metrics": metrics,
}


def file_block(path: str) -> str:
    """A file of the repository as a code block."""
    language = {".py": "python", ".toml": "toml"}[Path(path).suffix]
    return f"```{language}\n{(DOCS.parent / path).read_text(encoding='utf-8')}```\n"


def refresh(page: str) -> str:
    """A page with all its tables and files written anew."""
    return PLACE.sub(lambda f: f[1] + (TABLES[f[3]]() if f[2] == "table" else file_block(f[3])) + f[4], page)


def main() -> int:
    """Updates or checks every page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is out of date")
    is_check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        fresh = refresh(text)
        if fresh != text:
            stale.append(page.relative_to(DOCS.parent))
            if not is_check:
                page.write_text(fresh, encoding="utf-8")
    for path in stale:
        print(f"{path} {'is out of date: run ./run tables' if is_check else 'updated'}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main())
