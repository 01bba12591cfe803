"""What the loaders of model folders share: JSON files, and the list of files that a checkpoint consists of.

It opens no weights and imports no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cacheflow.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. The folder is not a complete model.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}. Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where an object is expected. Fetch the file again.")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Like `read_json`; empty when there is no such file."""
    return read_json(path) if path.exists() else {}


def weight_files(folder: Path, single: str, pattern: str) -> list[Path]:
    """The files that hold the weights: those of an index, or a single one; empty when there are none.

    Args:
        folder: The model's folder.
        single: The usual name of an undivided checkpoint, such as "model.safetensors"; its index is named after it.
        pattern: A glob for a file of another name, which is taken if it is the only one.

    Raises:
        CheckpointError: The index is damaged or names a file that is not there.
    """
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    if not index.is_file():
        others = [path for path in folder.glob(pattern) if path.is_file()]
        return others if len(others) == 1 else []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Fetch the file again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # An index comes with the checkpoint: it must not reach files outside the folder.
        if not re.fullmatch(r"[\w.-]+", name):
            raise CheckpointError(f"{index} names {name!r}, which is not a file name in its folder.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: the index lists {len(names)} files. Fetch the model again.")
    return [folder / name for name in names]


def has_weights(folder: Path, single: str, pattern: str) -> tuple[str, ...]:
    """Why the folder has no weights of this form; looks at names only."""
    if not folder.is_dir():
        return (f"{folder} is not a folder",)
    if (folder / single).is_file() or (folder / f"{single}.index.json").is_file():
        return ()
    others = sum(path.is_file() for path in folder.glob(pattern))
    return () if others == 1 else (f"no {single} and no index of one, but {others} other {pattern} in {folder}",)
