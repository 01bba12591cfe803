"""The examples of docs/plugins, put into a package and installed: they must pass what their pages tell readers to run."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheflow.conformance import FAILED, run_checks
from cacheflow.plugins import GROUPS, find_plugins, load_plugin

PAGES = Path(__file__).parents[2] / "docs" / "plugins"
BLOCK = re.compile(r"^```(python|toml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMES = {
    "weight_loaders": "npz",
    "attention_backends": "loop",
    "op_providers": "float32",
    "logits_processors": "no_digits",
    "schedulers": "shortest",
    "executors": "traced",
    "frontends": "plain",
    "commands": "hello",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A distribution on the import path with the module and the entry point of every page."""
    site = tmp_path_factory.mktemp("site")
    (site / "my_package").mkdir()
    (site / "my_package" / "__init__.py").touch()
    entry_points = []
    for group in NAMES:
        blocks = dict(BLOCK.findall((PAGES / f"{group.replace('_', '-')}.md").read_text(encoding="utf-8")))
        path = blocks["python"].splitlines()[0].removeprefix("# src/")
        (site / path).write_text(blocks["python"], encoding="utf-8")
        entry_points.append(blocks["toml"].replace("[project.entry-points.", "[").replace('"', ""))
    metadata = site / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("".join(entry_points))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        find_plugins.cache_clear()
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
            del sys.modules[name]
    find_plugins.cache_clear()
    load_plugin.cache_clear()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("group", NAMES)
def test_the_example_of_a_plugin_page_conforms(group: str) -> None:
    failures = [result for result in run_checks(f"cacheflow.{group}", NAMES[group]) if result.verdict == FAILED]
    assert not failures


@pytest.mark.usefixtures("installed")
def test_the_frontend_of_the_plugin_page_answers_bad_bodies_and_reads_no_endless_one() -> None:
    plugin = load_plugin("cacheflow.frontends", "plain")
    app = plugin.create_app(None, plugin.options(max_body_bytes=1024))

    def status_of(*parts: bytes) -> int:
        messages = iter([{"type": "http.request", "body": part, "more_body": True} for part in parts])
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return next(messages, {"type": "http.request", "body": b"", "more_body": False})

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
        asyncio.run(app(scope, receive, send))
        return int(sent[0]["status"])

    assert status_of(*[b"x" * 512] * 100) == 413
    assert status_of(b"\xff") == 400
    assert status_of(b'{"prompt": 1}') == 400


def test_every_group_has_a_page() -> None:
    pages = {page.stem.replace("-", "_") for page in PAGES.glob("*.md")} - {"index"}
    assert {f"cacheflow.{page}" for page in pages} == set(GROUPS)
