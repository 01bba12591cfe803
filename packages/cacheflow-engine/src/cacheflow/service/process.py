"""The engine's process: from a socket and a model that loads to a host that serves, and its orderly end.

While the model loads, a second thread has the socket and answers that it is loading. What started the process, and why, is
the supervisor's or the command line's business; what is said to clients from then on is `host`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import socket as unix_socket
import stat
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
import zmq

from cacheflow.config import EngineConfig
from cacheflow.errors import CacheflowError, ConfigError, EngineDeadError
from cacheflow.service import wire
from cacheflow.service.address import parse_address
from cacheflow.service.backlog import Backlog
from cacheflow.service.host import Host, refuse_hello
from cacheflow.service.journal import StepJournal, journal_path
from cacheflow.service.keys import EngineKey
from cacheflow.service.short_turns import short_turns, take_usual_turns
from cacheflow.service.watchdog import Watchdog

if TYPE_CHECKING:
    from cacheflow.core import EngineCore

logger = logging.getLogger(__name__)

SEND_QUEUE_LENGTH = 4096
"""Messages kept for a client that does not read them, about one a step; then the client is dropped."""
TELL_LOAD_ERROR_S = 5.0
"""How long a supervised engine waits for its client to ask, so that it learns why loading failed."""
END_AFTER_PARENT_S = 5.0
"""How long a supervised engine takes to end in order once its parent is gone."""


def bind(context: zmq.Context[zmq.Socket[bytes]], address: str, key: EngineKey | None = None) -> zmq.Socket[bytes]:
    """A ROUTER socket that listens on `address`; to a Unix socket only the owner may connect, beyond loopback who has the key.

    Raises:
        ConfigError: The address is not one, is off this machine without a key, or is taken.
    """
    endpoint = parse_address(address, has_key=key is not None)
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_CLIENT_MESSAGE_BYTES)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_LENGTH)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    if key is not None:
        key.secure_engine(socket)
    mask = os.umask(0o077)
    try:
        if endpoint.startswith("ipc://"):
            path = endpoint.removeprefix("ipc://")
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            _check_free(path)
        socket.bind(endpoint)
    except (OSError, zmq.ZMQError) as error:
        socket.close(0)
        raise ConfigError(f"Can't listen on {address}: {error.strerror}. Choose another address.") from error
    except ConfigError:
        socket.close(0)
        raise
    finally:
        os.umask(mask)
    return socket


def _check_free(path: str) -> None:
    """Only a socket that nobody listens on any more may give way: ZeroMQ would remove whatever is there."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(f"{path} is there already and is no socket. Choose another address.")
    with unix_socket.socket(unix_socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise ConfigError(f"Another process listens on {path}. End it, or choose another address.")


def serve(
    config: EngineConfig,
    address: str,
    *,
    is_supervised: bool = False,
    key_file: str | None = None,
    drain_timeout_s: float = 0.0,
) -> None:
    """Loads an engine and serves it, in the main thread, until SIGTERM or SIGINT.

    Args:
        config: Of the engine.
        address: Where to listen: `ipc:///path`, a path, or `tcp://host:port`.
        is_supervised: One client is sure to come, and is told of an error in loading before the process ends.
        key_file: Of the key that clients over TCP must have; made if it is missing.
        drain_timeout_s: How long running requests may go on after the first signal; a second one ends at once.

    Raises:
        CacheflowError: The address or the model can't be used.
        EngineDeadError: The engine can't go on.
        SystemExit: A signal came.
    """
    ending = _Ending(drain_timeout_s)
    key = None
    if key_file is not None:
        parse_address(address, has_key=True)
        EngineKey.make(key_file)
        key = EngineKey.read(key_file)
    with contextlib.ExitStack() as cleanup:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        cleanup.callback(context.term)
        if key is not None:
            cleanup.callback(key.admit_clients(context).stop)
        take_usual_turns()  # Not what it has of a frontend that started it.
        with short_turns():  # ZeroMQ's threads begin with its first socket.
            socket = bind(context, address, key)
        endpoint = parse_address(address, has_key=key is not None)
        cleanup.callback(socket.close)
        cleanup.callback(_remove_socket_file, endpoint)
        reception = _Reception(socket)
        try:
            core = _load(config)
            cleanup.callback(core.close)
            journal = StepJournal(journal_path(endpoint))
            host = Host(
                core,
                socket,
                log_stats=not config.disable_log_stats,
                log_requests=not config.disable_log_requests,
                journal=journal,
                backlog=Backlog(core, config),
                watchdog=Watchdog(config.step_timeout),
            )
        except Exception as error:
            reception.close()
            reception.tell(wire.LoadFailed(type(error).__name__, str(error)), is_supervised)
            raise
        finally:
            reception.close()
        logger.info("Serving %s at %s.", core.info.model, socket.getsockopt_string(zmq.LAST_ENDPOINT))
        host.greet(reception.identities)
        ending.host = host
        try:
            host.run()
        except SystemExit:
            journal.close()
            raise
        journal.close()


def _remove_socket_file(endpoint: str) -> None:
    # While the socket is still open, so that the file can't be another engine's.
    if endpoint.startswith("ipc://"):
        with contextlib.suppress(OSError):
            os.unlink(endpoint.removeprefix("ipc://"))


def _load(config: EngineConfig) -> EngineCore:
    from cacheflow.core import EngineCore

    return EngineCore(config)


class _Reception:
    """Answers clients while the model loads. It has the socket until `close`."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.identities: dict[bytes, None] = {}
        self._socket = socket
        self._start_s = time.monotonic()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="cacheflow-reception", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the socket back to the caller's thread."""
        self._is_closing = True
        self._thread.join()

    def tell(self, failure: wire.LoadFailed, must_be_heard: bool) -> None:
        """Says to all who asked, or will ask within `TELL_LOAD_ERROR_S` while nobody has yet, that loading failed."""
        end_s = time.monotonic() + (TELL_LOAD_ERROR_S if must_be_heard else 0.0)
        while not self.identities and (left_s := end_s - time.monotonic()) > 0:
            self._answer(timeout_s=left_s)
        for identity in self.identities:
            self._send(identity, failure)

    def _run(self) -> None:
        while not self._is_closing:
            self._answer(timeout_s=0.05)

    def _answer(self, timeout_s: float) -> None:
        if not self._socket.poll(int(timeout_s * 1000)):
            return
        identity, *frames = self._socket.recv_multipart()
        try:
            message = wire.decode_client_message(b"".join(frames))
        except wire.MalformedMessageError as error:
            logger.warning("A message from a client is ignored: %s", error)
            return
        if isinstance(message, wire.Hello):
            refusal = refuse_hello(message)
            if refusal is None:
                self.identities[identity] = None
            self._send(identity, refusal or wire.Loading(time.monotonic() - self._start_s))

    def _send(self, identity: bytes, message: wire.EngineMessage) -> None:
        with contextlib.suppress(zmq.ZMQError):  # It left without waiting.
            self._socket.send_multipart((identity, wire.encode_engine_message(message)), zmq.NOBLOCK)


class _Ending:
    """What SIGTERM and SIGINT do.

    The first lets running requests finish, if there is time for that; the next ends in order, one more ends it where it stands.
    """

    def __init__(self, drain_timeout_s: float) -> None:
        self.host: Host | None = None
        self._drain_timeout_s = drain_timeout_s
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        host, timeout_s, self._drain_timeout_s = self.host, self._drain_timeout_s, 0.0
        if host is not None and host.has_unfinished and timeout_s > 0:
            host.drain(timeout_s)
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise SystemExit(0)


class Startup(msgspec.Struct, frozen=True):
    """What a supervisor writes to the engine's standard input, as one line of JSON; then it keeps the pipe open.

    Attributes:
        address: Where to listen: a Unix socket in a folder of its own, which is removed at the end.
        config: Of the engine.
        log_level: Of the "cacheflow" logger.
    """

    address: str
    config: EngineConfig
    log_level: int


def main() -> None:
    """The supervised engine process. It ends with its parent."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise SystemExit(1)  # The parent is gone already.
    startup = msgspec.json.decode(line, type=Startup)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cacheflow").setLevel(startup.log_level)
    folder = os.path.dirname(startup.address.removeprefix("ipc://"))
    threading.Thread(target=_end_with_parent, args=(os.getppid(), folder), name="cacheflow-parent", daemon=True).start()
    try:
        serve(startup.config, startup.address, is_supervised=True)
    except EngineDeadError as error:
        logger.critical("%s", error)
        raise SystemExit(1) from error
    except CacheflowError as error:
        raise SystemExit(1) from error  # The client was told, and the parent raises it.
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # It is ending already.
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent(parent_pid: int, folder: str) -> None:
    # The pipe closes when the parent is gone, however it went, unless a process that it forked holds it open.
    poll = select.poll()
    poll.register(sys.stdin.buffer, select.POLLHUP)
    while os.getppid() == parent_pid and not poll.poll(1000):
        pass
    logger.warning("The process that started the engine is gone; the engine ends.")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_AFTER_PARENT_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
