"""Which requests were in the running step when an engine process died: a small file that outlives it.

It knows ids and counts, no requests. A request that was running at several deaths in a row is a suspect.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cacheflow.loading.cache import cache_folder
from cacheflow.types import EngineRequest

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
"""Requests whose deaths are counted; the latest are kept."""

RequestKey = tuple[str, str]
"""Client id and request id."""


class _Content(msgspec.Struct, array_like=True):
    num_deaths: list[tuple[RequestKey, int]]
    running: list[RequestKey]


class StepJournal:
    """Reads what the engine before this one was doing, and writes what this one does.

    A step costs one small write into the page cache, which survives the process, though not the machine. Where nothing can be
    written, it does nothing, after a warning.

    Args:
        path: The file; its folder is made if needed.

    Attributes:
        num_deaths: For each suspect, in how many deaths it was in the running step.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_deaths = _read_deaths(path)
        self._encoder = msgspec.msgpack.Encoder()
        self._deaths = list(self.num_deaths.items())[-MAX_REMEMBERED:]
        self._file = -1
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._give_up(error)
        self.write(())

    def write(self, running: Iterable[EngineRequest]) -> None:
        """A step with these requests is about to run."""
        if self._file < 0:
            return
        content = _Content(self._deaths, [(r.client_id, r.request_id) for r in running])
        data = self._encoder.encode(content)
        try:
            os.pwrite(self._file, len(data).to_bytes(4, "little") + data, 0)
        except OSError as error:
            self.close()
            self._give_up(error)

    def close(self) -> None:
        """The engine ends in order: there is nothing to suspect. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        # A full disk or a folder that is only to be read is no reason to serve nobody.
        logger.warning(
            "The journal %s can't be written (%s). Should a request kill this engine, the next one will not know which.",
            self._path,
            error.strerror,
        )


def journal_path(address: str) -> Path:
    """Where the engine at `address` keeps its journal: beside a Unix socket, else in the cache folder."""
    if address.startswith("ipc://"):
        return Path(address.removeprefix("ipc://") + ".journal")
    return cache_folder() / "journals" / hashlib.sha256(address.encode()).hexdigest()[:32]


def _read_deaths(path: Path) -> dict[RequestKey, int]:
    try:
        data = path.read_bytes()
        content = msgspec.msgpack.decode(data[4 : 4 + int.from_bytes(data[:4], "little")], type=_Content)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("The journal %s of an earlier engine can't be read: %s", path, error)
        return {}
    deaths = dict(content.num_deaths)
    for key in dict.fromkeys(content.running):
        deaths[key] = deaths.pop(key, 0) + 1
    return deaths
