"""The private folder of a supervised engine."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cacheflow.service.supervisor import _make_own


def test_the_folder_is_made_again_and_only_its_owner_enters_it(tmp_path: Path) -> None:
    folder = tmp_path / "cacheflow-x"
    _make_own(str(folder))
    _make_own(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_somebody_else_has_made_under_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "own").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in ("open", "link"):
        with pytest.raises(PermissionError, match="only this user"):
            _make_own(str(tmp_path / name))
