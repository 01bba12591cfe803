"""cacheflow's own cache folder: the demo model, and tokenizers that were converted once.

What lies in it can be deleted at any time. Files appear whole or not at all, so processes can share it without locks.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$CACHEFLOW_CACHE`, else `cacheflow` in `$XDG_CACHE_HOME` or `~/.cache`, beside the hub's. It may not exist yet."""
    chosen = os.environ.get("CACHEFLOW_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cacheflow"


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that other processes see all of it or nothing, and makes its folder.

    Raises:
        OSError: The folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
