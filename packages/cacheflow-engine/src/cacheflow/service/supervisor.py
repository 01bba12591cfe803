"""Runs an engine in a child process: starts it, waits until it serves, starts it anew when it dies, sees to its end.

It owns the process and the private folder of its socket. It knows no request; the client of the child is an ordinary
`EngineClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import time

import msgspec

from cacheflow.config import EngineConfig
from cacheflow.errors import EngineDeadError
from cacheflow.service.address import MAX_IPC_PATH_BYTES
from cacheflow.service.client import EngineClient
from cacheflow.service.process import Startup

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
"""How long a child may take to end after SIGTERM, before it is killed."""
STABLE_S = 60.0
"""An engine that has run for so long did not die of what killed the one before it."""
MAX_DEATHS = 3
"""How many times in a row an engine is started again."""
BACK_OFF_S = 1.0
"""How long to wait before the second start in a row; before the first there is no wait, before the third three times this."""
LAST_WORD_S = 1.0
"""How long after a child's end its last message may still be on its way."""


class EngineProcess:
    """A supervised engine. Made by `start`, and to be closed; if this process dies, however it does, the child ends too.

    Attributes:
        address: Of its socket, in a folder that only this user can enter.
    """

    def __init__(self, config: EngineConfig, folder: str) -> None:
        self.address = f"ipc://{folder}/engine.sock"
        self._config = config
        self._folder = folder
        self._process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, config: EngineConfig) -> EngineProcess:
        """Starts the process; `connect` waits until it is ready."""
        folder = tempfile.mkdtemp(prefix="cacheflow-")
        if len(os.fsencode(folder)) > MAX_IPC_PATH_BYTES - len("/engine.sock"):
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="cacheflow-", dir="/tmp")
        self = cls(config, folder)
        await self._spawn()
        return self

    async def _spawn(self) -> None:
        _make_own(self._folder)
        try:
            # Without -P the current folder comes first on the path, and a file there may be called like a module.
            safe_path = ["-P"] if sys.version_info >= (3, 11) else []
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *safe_path,
                "-m",
                "cacheflow.service",
                stdin=asyncio.subprocess.PIPE,
                stdout=2,  # What it prints belongs to the log, not into this process's output.
                start_new_session=True,  # Ctrl-C is for this process, which then ends the child in order.
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        startup = Startup(self.address, self._config, logging.getLogger("cacheflow").getEffectiveLevel())
        assert self._process.stdin is not None
        try:
            with contextlib.suppress(ConnectionError):  # It has ended already, which `connect` tells.
                self._process.stdin.write(msgspec.json.encode(startup) + b"\n")
                await self._process.stdin.drain()
        except BaseException:
            await self.close()
            raise

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

    async def keep_alive(self) -> str:
        """Starts the process anew, at the same address, whenever it ends; returns when that is hopeless, saying why."""
        num_deaths = 0
        while True:
            started_s = time.monotonic()
            end = await self.ended()
            num_deaths = 1 if time.monotonic() - started_s > STABLE_S else num_deaths + 1
            if num_deaths > MAX_DEATHS:
                return f"{end}, {num_deaths} times in a row within {STABLE_S:.0f} s of its start"
            delay_s = BACK_OFF_S * (2 ** (num_deaths - 1) - 1)
            logger.error("%s. It is started again in %g s.", end, delay_s)
            await asyncio.sleep(delay_s)
            try:
                await self._spawn()
            except OSError as error:
                return f"{end}, and another one can't be started: {error}"

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


def _make_own(folder: str) -> None:
    """Makes the folder again, which an engine that ends in order removes: its name is known by then, and others may be faster.

    Raises:
        OSError: It is somebody else's, or others may enter it.
    """
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PermissionError(errno.EPERM, "not a folder that only this user enters", folder) from None
