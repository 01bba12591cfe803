"""The files of the page: how they are served, and that they need nothing but each other."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from cacheflow_server import page

NAMES = sorted(file.name for file in files(page).iterdir() if file.name != "index.html" and "." in file.name[1:])
SERVED = [name for name in NAMES if not name.endswith(".py")]
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


def text_of(name: str) -> str:
    return (files(page) / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def client(app_client: Any) -> Any:
    return app_client(Starlette(routes=page.routes()))


def test_the_page_stands_at_the_root(client: Any) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == text_of("index.html")


@pytest.mark.parametrize("name", SERVED)
def test_each_file_has_its_type_and_the_policy(client: Any, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == TYPES[Path(name).suffix]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_source_of_the_server_is_served(client: Any) -> None:
    assert client.get("/page/__init__.py").status_code == 404
    assert client.get("/page/index.html").status_code == 404
    assert client.get("/page/../app.py").status_code == 404


def test_who_has_a_file_already_gets_no_body(client: Any) -> None:
    etag = client.get("/page/main.js").headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        answer = client.get("/page/main.js", headers={"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b"")
    assert client.get("/page/main.js", headers={"if-none-match": '"other"'}).status_code == 200


def test_every_file_is_used_and_every_used_file_is_there() -> None:
    used = set(re.findall(r'(?:src|href)="page/([^"]+)"', text_of("index.html")))
    for name in SERVED:
        used |= set(re.findall(r'from "\./([^"]+)"', text_of(name)))
    assert used == set(SERVED)


def test_the_html_has_neither_scripts_nor_styles_of_its_own() -> None:
    html = text_of("index.html")
    assert not re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html)


@pytest.mark.parametrize("name", [*SERVED, "index.html"])
def test_no_file_names_another_host(name: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'`)]+", text_of(name))) <= {"http://www.w3.org/2000/svg"}
