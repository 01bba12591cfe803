"""Runs an engine in a child process: starts it, waits until it serves, sees to its end.

It owns the process and the private folder of its socket. It knows no request; the client of the child is an ordinary
`EngineClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile

import msgspec

from cacheflow.config import EngineConfig
from cacheflow.errors import EngineDeadError
from cacheflow.service import wire
from cacheflow.service.client import EngineClient
from cacheflow.service.host import Startup

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
"""How long a child may take to end after SIGTERM, before it is killed."""
LAST_WORD_S = 1.0
"""How long after a child's end its last message may still be on its way."""


class EngineProcess:
    """A supervised engine. Made by `start`, and to be closed; if this process dies, however it does, the child ends too.

    Attributes:
        address: Of its socket, in a folder that only this user can enter.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: str, address: str) -> None:
        self.address = address
        self._process = process
        self._folder = folder

    @classmethod
    async def start(cls, config: EngineConfig) -> EngineProcess:
        """Starts the process; `connect` waits until it is ready."""
        folder = tempfile.mkdtemp(prefix="cacheflow-")
        try:
            if len(os.fsencode(folder)) > wire.MAX_IPC_PATH_BYTES - len("/engine.sock"):
                os.rmdir(folder)
                folder = tempfile.mkdtemp(prefix="cacheflow-", dir="/tmp")
            address = f"ipc://{folder}/engine.sock"
            # Without -P the current folder comes first on the path, and a file there may be called like a module.
            safe_path = ["-P"] if sys.version_info >= (3, 11) else []
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *safe_path,
                "-m",
                "cacheflow.service",
                stdin=asyncio.subprocess.PIPE,
                stdout=2,  # What it prints belongs to the log, not into this process's output.
                start_new_session=True,  # Ctrl-C is for this process, which then ends the child in order.
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self = cls(process, folder, address)
        startup = Startup(address, config, logging.getLogger("cacheflow").getEffectiveLevel())
        assert process.stdin is not None
        try:
            with contextlib.suppress(ConnectionError):  # It has ended already, which `connect` tells.
                process.stdin.write(msgspec.json.encode(startup) + b"\n")
                await process.stdin.drain()
        except BaseException:
            await self.close()
            raise
        return self

    async def connect(self) -> EngineClient:
        """Waits until the engine is ready, as long as its process lives.

        Raises:
            CacheflowError: The model can't be loaded; the error is of the same class as in the child.
            EngineDeadError: The process ended.
        """
        connecting = asyncio.create_task(EngineClient.connect(self.address, timeout_s=float("inf")))
        ending = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({connecting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                await asyncio.wait({connecting}, timeout=LAST_WORD_S)
            if not connecting.done():
                raise EngineDeadError(f"{await self.ended()} before it was ready. What it logged says why.")
            return connecting.result()
        finally:
            for task in (connecting, ending):
                task.cancel()
            await asyncio.gather(connecting, ending, return_exceptions=True)

    async def ended(self) -> str:
        """Waits for the process to end, and says how it did."""
        code = await self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"The engine process {self._process.pid} {how}"

    async def close(self) -> None:
        """Ends the process: SIGTERM, and after `END_TIMEOUT_S` SIGKILL. May be called twice."""
        try:
            if self._process.returncode is None:
                self._signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(self._process.wait(), END_TIMEOUT_S)
                except asyncio.TimeoutError:
                    logger.warning("The engine process did not end within %.0f s; it is killed.", END_TIMEOUT_S)
        finally:
            self._signal(signal.SIGKILL)
            await self._process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
