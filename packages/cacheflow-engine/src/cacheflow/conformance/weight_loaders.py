"""Conformance of `cacheflow.weight_loaders`: reasons instead of guesses, `CheckpointError` for damage, and no code run.

What a loader reads is its own: it is offered files of every known form, and held to those that it says it supports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cacheflow.conformance.tiny_model import CONFIG
from cacheflow.conformance.verdict import ConformanceFailure, NotApplicable, expect, expect_reasons
from cacheflow.errors import CheckpointError

FILE_NAMES = ("model.safetensors", "pytorch_model.bin", "model.gguf", "model.npz", "model.ckpt", "model.pt")


class _RunsCode:
    """Unpickles by making a folder: harmless, and seen if it happens."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._trace),)


def _garbage() -> dict[str, bytes]:
    """Ways for a file to be damaged; the numbers in the last two ask for more memory than there is."""
    return {
        "empty": b"",
        "noise": bytes(range(256)) * 8,
        "text": b"this is not a checkpoint\n" * 40,
        "a zip archive cut short": b"PK\x03\x04" + b"\x00" * 100,
        "a safetensors header of 2^60 bytes": (2**60).to_bytes(8, "little") + b'{"a":' + b" " * 64,
        "a GGUF of 2^60 tensors": b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2 + b"\x00" * 64,
    }


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder with a sound configuration and nothing else."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        yield folder


def _claimed(plugin: Any) -> Iterator[tuple[Path, Path]]:
    """For each kind of file that the loader reads: a folder with an empty one in it, and the path that the loader supports.

    A file counts when the loader says yes to it, or to the folder because of it: a loader that needs no file reads none.
    """
    num_claimed = 0
    for file_name in FILE_NAMES:
        with _folder() as folder:
            needs_no_file = not expect_reasons(plugin.supports(folder))
            file = folder / file_name
            file.write_bytes(b"")
            for path in (file,) if needs_no_file else (folder, file):
                if not expect_reasons(plugin.supports(path)):
                    num_claimed += 1
                    yield file, path
    if not num_claimed:
        raise NotApplicable(f"it reads none of {', '.join(FILE_NAMES)}")


def _expect_checkpoint_error(read: Callable[[], Any], what: str) -> None:
    try:
        read()
    except CheckpointError as error:
        expect(str(error).strip(), f"{what}: the CheckpointError says nothing")
    except Exception as error:
        raise ConformanceFailure(f"{what}: must raise CheckpointError, raised {type(error).__name__}: {error}") from error
    else:
        raise ConformanceFailure(f"{what}: must raise CheckpointError, raised nothing")


def _drain(plugin: Any, path: Path) -> int:
    return sum(1 for _ in plugin.tensors(path))


def check_empty_folder_is_refused(plugin: Any, name: str) -> None:
    """`supports` gives reasons for a folder without anything in it, and for one that does not exist."""
    with TemporaryDirectory() as folder:
        for path, what in ((Path(folder), "an empty folder"), (Path(folder) / "absent", "a path that does not exist")):
            expect(expect_reasons(plugin.supports(path)), f"supports({what}) must give a reason why not, got ()")


def check_damage_is_a_checkpoint_error(plugin: Any, name: str) -> None:
    """Reading the tensors of a damaged file raises `CheckpointError` and takes no memory that the file does not have."""
    for file, path in _claimed(plugin):
        for title, content in _garbage().items():
            file.write_bytes(content)
            if not plugin.supports(path):
                _expect_checkpoint_error(partial(_drain, plugin, path), f"{file.name} ({title})")


def check_no_code_of_a_checkpoint_runs(plugin: Any, name: str) -> None:
    """A pickle that would run code is refused, and the code does not run."""
    for file, path in _claimed(plugin):
        with TemporaryDirectory() as elsewhere:
            trace = Path(elsewhere) / "code-ran"
            for zipped in (False, True):
                torch.save({"weight": _RunsCode(trace)}, file, _use_new_zipfile_serialization=zipped)
                if not plugin.supports(path):
                    _expect_checkpoint_error(partial(_drain, plugin, path), f"{file.name} with code in it")
                    expect(not trace.exists(), f"{file.name}: code from the checkpoint ran")


def check_damaged_configuration_is_a_checkpoint_error(plugin: Any, name: str) -> None:
    """`config` raises `CheckpointError` for a configuration that can't be read."""
    for file, path in _claimed(plugin):
        for content in (b"", b"{", b"[1, 2]", b"\xff\xfe"):
            (file.parent / "config.json").write_bytes(content)
            if not plugin.supports(path):
                _expect_checkpoint_error(partial(plugin.config, path), f"config.json is {content!r}")


CHECKS = (
    check_empty_folder_is_refused,
    check_damage_is_a_checkpoint_error,
    check_no_code_of_a_checkpoint_runs,
    check_damaged_configuration_is_a_checkpoint_error,
)
