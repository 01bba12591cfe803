"""Where cacheflow keeps what it can make again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cacheflow.loading.cache import cache_folder


def test_the_folder_is_the_users_choice_else_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHEFLOW_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/a")
    assert cache_folder() == Path("/home/a/.cache/cacheflow")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/cacheflow")
    monkeypatch.setenv("CACHEFLOW_CACHE", "/c")
    assert cache_folder() == Path("/c")
