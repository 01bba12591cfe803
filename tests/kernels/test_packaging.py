"""The wheel of cacheflow-kernels, with a compiler and without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "packages" / "cacheflow-kernels"
WITHOUT_CUDA = {"CACHEFLOW_BUILD_CUDA": "0"}
pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason="needs the sources of cacheflow-kernels")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy that was never built. Of the C++ it keeps one small file: what the others do is tested where they are."""
    copy = tmp_path / "cacheflow-kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "dist", "build"))
    for source in (copy / "src" / "cacheflow_kernels" / "cpu").glob("*.cpp"):
        if source.name != "level.cpp":
            source.unlink()
    return copy


def build(package: Path, **environment: str) -> tuple[Path, str]:
    """The wheel and what pip printed."""
    out = package.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(out), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | WITHOUT_CUDA | environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def test_without_a_compiler_the_wheel_is_pure_python_and_one_line_says_what_that_costs(package: Path, tmp_path: Path) -> None:
    wheel, printed = build(package, PATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(wheel) if name.endswith(".so")]
    (line,) = {line.strip() for line in printed.splitlines() if "without the compiled cpu kernels" in line}
    assert "no g++" in line
    assert "several times slower" in line


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_with_a_compiler_the_wheel_holds_a_library_that_loads_and_names_its_platform(package: Path, tmp_path: Path) -> None:
    wheel, printed = build(package)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert "without the compiled cpu kernels" not in printed
    library = "cacheflow_kernels/cpu/_cpu.so"
    assert library in names(wheel)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "unpacked")
    program = "from cacheflow_kernels.cpu import library; print(library.PATH, library.reasons(), library.level())"
    found = os.environ | {"PYTHONPATH": str(tmp_path / "unpacked")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=found, check=True)
    path, level = done.stdout.split(" () ")
    assert path == str(tmp_path / "unpacked" / library)
    assert level.strip() != "none"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_has_not_changed_is_not_compiled_again(package: Path, tmp_path: Path) -> None:
    folder = package / "src" / "cacheflow_kernels" / "cpu"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--hooks-only", "-t", "wheel"],
        cwd=package,
        env=os.environ | WITHOUT_CUDA,
        check=True,
    )
    first = (folder / "_cpu.so").stat().st_mtime_ns
    wheel, _ = build(package, PATH=str(tmp_path))
    assert "cacheflow_kernels/cpu/_cpu.so" in names(wheel)
    with (folder / "level.h").open("a", encoding="utf-8") as header:
        header.write("// changed\n")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--hooks-only", "-t", "wheel"],
        cwd=package,
        env=os.environ | WITHOUT_CUDA,
        check=True,
    )
    assert (folder / "_cpu.so").stat().st_mtime_ns > first


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_source_that_does_not_compile_leaves_it_out_and_says_where(package: Path) -> None:
    (package / "src" / "cacheflow_kernels" / "cpu" / "broken.cpp").write_text("int broken( {\n")
    wheel, printed = build(package)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "broken.cpp:1" in printed


def test_the_cuda_kernels_that_were_asked_for_are_not_left_out_in_silence(package: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="CACHEFLOW_BUILD_CUDA=1"):
        build(package, PATH=str(tmp_path), CACHEFLOW_BUILD_CUDA="1")
