"""The client side of the engine's socket: submits requests and hands each its own updates.

It owns who waits for what, and when the connection is made anew. It knows token ids and messages, no text; it imports no torch.
Whether the engine is a child of this process or a service elsewhere makes no difference here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import zmq

from cacheflow.errors import (
    CacheflowError,
    EngineDeadError,
    EngineDrainingError,
    EngineOverloadedError,
    InvalidRequestError,
)
from cacheflow.service import wire
from cacheflow.service.address import parse_address
from cacheflow.service.connection import Connection
from cacheflow.service.keys import EngineKey
from cacheflow.service.stream import Stream
from cacheflow.types import EngineRequest, EngineStats, EngineView, ModelInfo, RequestUpdate

logger = logging.getLogger(__name__)

HELLO_INTERVAL_S = 1.0
"""How often an engine that has not answered yet is asked again."""
SILENCE_LOG_S = 2.0
"""After how long without any answer waiting for one is worth a line in the log."""
LOADING_LOG_INTERVAL_S = 10.0
"""How often waiting for a model that loads is worth a line in the log."""
REJOIN_TIMEOUT_S = 30.0
"""How long an engine that was lost may take until it, or another one at its address, answers; loading counts as an answer."""
REJOIN_PAUSE_S = 1.0
"""How long to wait before an engine is looked for again, after one could not be had."""
MAX_READINGS = 256
"""Questions about the engine's state that may wait for their answers, while a step takes long."""
READING_RETRY_S = 1.0
MAX_UNSENT = 1024
"""Requests that came while there was no engine, and wait for one."""
GOODBYE_LINGER_MS = 200
"""How long closing waits for the last messages to be taken."""


class EngineClient:
    """A connection to an engine process. Made by `connect`, within a running event loop, and to be closed.

    When the engine dies and another one comes up at its address within the stated time, every unfinished request is sent to
    it with what was received so far, and its stream goes on: nothing is lost, nothing comes twice. After that time the requests
    end with an error and new ones are refused, until an engine answers there again.

    Attributes:
        address: Of the engine.
        client_id: Its name towards the engine, drawn at random.
        model_info: What the engine serves.
    """

    def __init__(
        self,
        address: str,
        client_id: str,
        connection: Connection,
        model_info: ModelInfo,
        rejoin_timeout_s: float,
        key: EngineKey | None = None,
    ) -> None:
        self.address = address
        self.client_id = client_id
        self.model_info = model_info
        self._connection = connection
        self._key = key
        self._is_connected = True
        self._rejoin_timeout_s = rejoin_timeout_s
        self._streams: dict[str, Stream] = {}
        self._reading_waiters: deque[asyncio.Future[Any]] = deque()
        self._is_draining = False
        self._is_engine_draining = False
        self._outage: EngineDeadError | None = None
        self._death: EngineDeadError | None = None
        self._task = asyncio.create_task(self._stay_connected())

    @classmethod
    async def connect(
        cls,
        address: str,
        timeout_s: float = 60.0,
        rejoin_timeout_s: float = REJOIN_TIMEOUT_S,
        key_file: str | None = None,
    ) -> EngineClient:
        """Connects and waits until the engine is ready.

        Args:
            address: `ipc:///path`, a path, or `tcp://host:port`.
            timeout_s: How long to wait for an answer. An engine that answers that it is loading is waited for.
            rejoin_timeout_s: The same, when the connection is lost later.
            key_file: The engine's key, for TCP; needed for another machine.

        Raises:
            ConfigError: The address is not one, or on another machine and there is no key, or the key can't be read.
            EngineDeadError: Nobody answers, or the two sides speak different versions.
            CacheflowError: The engine could not load its model; the error is of the same class as there.
        """
        client_id = secrets.token_hex(16)
        key = None if key_file is None else EngineKey.read(key_file)
        connection = Connection(parse_address(address, has_key=key is not None), key)
        try:
            model_info = await _shake_hands(connection, client_id, address, timeout_s)
        except BaseException:
            connection.close(linger_ms=0)
            raise
        return cls(address, client_id, connection, model_info, rejoin_timeout_s, key)

    @property
    def is_alive(self) -> bool:
        """Whether the engine is there, as far as is known."""
        return self._death is None and self._is_connected

    @property
    def is_draining(self) -> bool:
        """Whether nothing new is taken, because this side or the engine is ending."""
        return self._is_draining or self._is_engine_draining

    async def submit(self, request: EngineRequest) -> AsyncGenerator[RequestUpdate, None]:
        """Sends a request and gives its updates, the last one `finished`. Leaving the iterator early aborts the request.

        Raises:
            InvalidRequestError: The request can't be served, can't be sent, or its id is in use.
            EngineOverloadedError: The engine's waiting room is full, or the engine is gone and too much waits for another one.
            EngineDrainingError: This side or the engine is ending.
            EngineDeadError: The engine ended or can't be reached.
        """
        data = wire.pack_request(request)
        stream = await self._open(request)
        try:
            if self._is_connected:  # Otherwise it is sent with the others, once an engine is there again.
                self._connection.send(data)
                stream.is_sent = True
            while True:
                update = await stream.updates.get()
                if isinstance(update, CacheflowError):
                    raise update
                yield update
                if update.finished:
                    return
        finally:
            if not stream.ended.is_set():
                stream.is_left = True
                self.abort(request.request_id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one sequence of it. Its stream gets a last update without sequences. An unknown id is ignored."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if index is not None:
            stream.note_abort(index)
        if self._is_connected:
            self._connection.send(wire.encode_client_message(wire.Abort(request_id, index)))
        elif index is None:
            self._end(request_id, RequestUpdate(request_id=request_id, client_id=self.client_id, sequences=[], finished=True))

    async def stats(self) -> EngineStats:
        """A reading of the engine.

        Raises:
            EngineDeadError: The engine ended or can't be reached.
            EngineOverloadedError: Too many such questions wait.
        """
        stats: EngineStats = await self._read(wire.StatsRequest())
        return stats

    async def view(self) -> EngineView:
        """Who holds which block of the engine.

        Raises:
            EngineDeadError: The engine ended or can't be reached.
            EngineOverloadedError: Too many such questions wait.
        """
        view: EngineView = await self._read(wire.ViewRequest())
        return view

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new from now on, and waits for what runs; after `timeout_s` that ends with an `EngineDrainingError`."""
        self._is_draining = True
        end_s = asyncio.get_running_loop().time() + timeout_s
        while self._streams:
            left_s = end_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(next(iter(self._streams.values())).ended.wait(), left_s)
        for request_id in list(self._streams):
            if self._is_connected:
                self._connection.send(wire.encode_client_message(wire.Abort(request_id)))
            message = f"The server is ending, and the request did not finish within {timeout_s:g} s. Send it again."
            self._end(request_id, EngineDrainingError(message))

    def fail(self, error: EngineDeadError) -> None:
        """Gives the engine up: everything that waits for it gets the error, now and from now on. The first call counts."""
        if self._death is not None:
            return
        self._death = error
        self._fail_streams(error)
        self._fail_readings(error)

    async def close(self) -> None:
        """Says goodbye, which aborts what is unfinished, and closes the connection. May be called twice."""
        was_alive = self.is_alive
        if was_alive:
            self._connection.send(wire.encode_client_message(wire.Goodbye()))
        self.fail(EngineDeadError(f"The connection to the engine at {self.address} was closed. Send the request again."))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._connection.close(linger_ms=GOODBYE_LINGER_MS if was_alive else 0)

    async def _open(self, request: EngineRequest) -> Stream:
        request_id = request.request_id
        while True:
            error = self._death or self._outage
            if error is not None:
                raise EngineDeadError(str(error))
            if self.is_draining:
                raise EngineDrainingError("The server is ending: it finishes what runs and takes nothing new. Try again soon.")
            known = self._streams.get(request_id)
            if known is None:
                break
            if not known.is_left:
                raise InvalidRequestError(f"The request id {request_id!r} is in use.", param="request_id")
            await known.ended.wait()
        num_unsent = 0 if self._is_connected else sum(not s.is_sent for s in self._streams.values())
        if num_unsent >= MAX_UNSENT:
            raise EngineOverloadedError(
                f"The engine is gone, and {num_unsent} requests wait for another one. Try again in {REJOIN_PAUSE_S:g} s.",
                REJOIN_PAUSE_S,
            )
        stream = self._streams[request_id] = Stream(request)
        return stream

    def _end(self, request_id: str, last: RequestUpdate | CacheflowError) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.updates.put_nowait(last)
            stream.ended.set()

    async def _read(self, question: wire.StatsRequest | wire.ViewRequest) -> Any:
        if not self.is_alive:
            raise EngineDeadError(
                str(self._death or self._outage or f"The engine at {self.address} is gone; another one is waited for.")
            )
        if len(self._reading_waiters) >= MAX_READINGS:
            raise EngineOverloadedError(
                f"The engine has not answered {MAX_READINGS} earlier questions about its state: its step takes long.",
                retry_after_s=READING_RETRY_S,
            )
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._reading_waiters.append(waiter)
        self._connection.send(wire.encode_client_message(question))
        return await waiter

    def _fail_streams(self, error: EngineDeadError) -> None:
        for request_id in list(self._streams):
            self._end(request_id, EngineDeadError(str(error)))

    def _fail_readings(self, error: EngineDeadError) -> None:
        while self._reading_waiters:
            waiter = self._reading_waiters.popleft()
            if not waiter.done():
                waiter.set_exception(EngineDeadError(str(error)))

    # In the background.

    async def _stay_connected(self) -> None:
        try:
            while self._death is None:
                loss = await self._serve()
                self._is_connected = False
                self._connection.close(linger_ms=0)
                self._fail_readings(loss)
                if self._death is not None:
                    return
                logger.warning("%s Waiting up to %g s for one to answer there.", loss, self._rejoin_timeout_s)
                self._connection = await self._rejoin(loss)
                self._outage = None
                self._is_connected = True
                self._is_engine_draining = False
                self._send_again()
        except Exception as error:  # Whatever it is, those who wait must hear of it.
            logger.exception("The connection to the engine at %s can't be kept.", self.address)
            self.fail(EngineDeadError(f"The connection to the engine at {self.address} failed: {error!r}."))

    async def _serve(self) -> EngineDeadError:
        """Receives and keeps the lease until the connection is lost, and says how that was."""
        tasks = [asyncio.create_task(work) for work in (self._receive(), self._watch_connection(), self._keep_lease())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _rejoin(self, loss: EngineDeadError) -> Connection:
        """Looks for an engine until there is one; gives up what waits for it when that takes longer than was stated."""
        while True:
            try:
                return await self._try_rejoin()
            except CacheflowError as error:
                if self._outage is None:
                    self._outage = EngineDeadError(f"{loss} {error}")
                    logger.error("%s Requests are refused until an engine of this model answers there.", self._outage)
                    self._fail_streams(self._outage)
                await asyncio.sleep(REJOIN_PAUSE_S)

    async def _try_rejoin(self) -> Connection:
        connection = Connection(parse_address(self.address, has_key=self._key is not None), self._key)
        try:
            info = await _shake_hands(connection, self.client_id, self.address, self._rejoin_timeout_s)
            if info != self.model_info:
                raise EngineDeadError(f"The engine that answers there now serves {info.model!r} with other numbers.")
        except BaseException:
            connection.close(linger_ms=0)
            raise
        return connection

    def _send_again(self) -> None:
        for request_id, stream in list(self._streams.items()):
            if stream.is_left:
                self._end(request_id, RequestUpdate(request_id=request_id, sequences=[], finished=True))
            else:
                try:
                    self._connection.send(wire.pack_request(stream.again(), is_again=stream.is_sent))
                    stream.is_sent = True
                except InvalidRequestError as error:  # With its outputs it is more than a message takes.
                    self._end(request_id, error)
        logger.warning("The engine at %s is back; %d requests go on.", self.address, len(self._streams))

    async def _receive(self) -> EngineDeadError:
        try:
            while True:
                loss = self._handle(wire.decode_engine_message(await self._connection.receive()))
                if loss is not None:
                    return loss
                # Receiving does not wait while messages are there: a fast engine would keep everybody else from their turn.
                await asyncio.sleep(0)
        except wire.MalformedMessageError as error:
            self.fail(EngineDeadError(f"The engine at {self.address} sent what can't be read: {error}"))
            return EngineDeadError(str(error))
        except zmq.ZMQError as error:
            return EngineDeadError(f"The connection to the engine at {self.address} failed: {error}.")

    def _handle(self, message: wire.EngineMessage) -> EngineDeadError | None:
        """Hands a message to whom it concerns; returns why the connection is lost, if it says so."""
        if isinstance(message, wire.Updates):
            for update in message.updates:
                stream = self._streams.get(update.request_id)
                if stream is None:
                    continue
                stream.note(update)
                if update.finished:
                    self._end(update.request_id, update)
                else:
                    stream.updates.put_nowait(update)
        elif isinstance(message, wire.Refused):
            self._end(message.request_id, message.exception())
        elif isinstance(message, (wire.StatsReply, wire.ViewReply)):
            waiter = self._reading_waiters.popleft() if self._reading_waiters else None
            if waiter is not None and not waiter.done():
                waiter.set_result(message.stats if isinstance(message, wire.StatsReply) else message.view)
        elif isinstance(message, wire.Draining):
            self._is_engine_draining = True
        elif isinstance(message, wire.Unknown):
            return EngineDeadError(
                f"The engine at {self.address} does not know this client any more: it was restarted, or had no sign of "
                f"life from here for {wire.LEASE_S:.0f} s."
            )
        # What is left belongs to the handshake, such as the answer to a `Hello` that was sent twice.
        return None

    async def _watch_connection(self) -> EngineDeadError:
        await self._connection.lost()
        # What arrived before the end is read first: it may hold the last updates of some requests.
        for message in self._connection.receive_rest():
            with contextlib.suppress(wire.MalformedMessageError):
                self._handle(wire.decode_engine_message(message))
        return EngineDeadError(f"The engine at {self.address} is gone: its end of the connection closed.")

    async def _keep_lease(self) -> EngineDeadError:
        while True:
            await asyncio.sleep(wire.PING_INTERVAL_S)
            self._connection.send(wire.encode_client_message(wire.Ping()))


async def _shake_hands(connection: Connection, client_id: str, address: str, timeout_s: float) -> ModelInfo:
    loop = asyncio.get_running_loop()
    hello = wire.encode_client_message(wire.Hello(wire.PROTOCOL_VERSION, client_id))
    interval_s = min(HELLO_INTERVAL_S, timeout_s / 3)
    answered_s = loop.time()
    logged_s = 0.0
    # An engine that may take for ever is one that was started just now, by its supervisor.
    is_silence_logged = math.isinf(timeout_s)
    connection.send(hello)
    while True:
        try:
            data = await asyncio.wait_for(connection.receive(), interval_s)
            message = wire.decode_engine_message(data)
        except asyncio.TimeoutError:
            if loop.time() - answered_s >= timeout_s:
                raise EngineDeadError(
                    f"No answer from an engine at {address} within {timeout_s:g} s. "
                    f"Is `cacheflow engine --listen {address}` running{connection.key_question}?"
                ) from None
            if not is_silence_logged and loop.time() - answered_s >= min(SILENCE_LOG_S, timeout_s / 2):
                is_silence_logged = True
                logger.info("No answer from an engine at %s yet; waiting up to %g s for one.", address, timeout_s)
            connection.send(hello)
            continue
        except wire.MalformedMessageError as error:
            raise EngineDeadError(f"What answers at {address} is no engine of this version: {error}") from error
        answered_s = loop.time()
        if isinstance(message, wire.Welcome):
            return message.info
        if isinstance(message, wire.LoadFailed):
            raise message.exception()
        if isinstance(message, wire.Rejected):
            raise EngineDeadError(f"The engine at {address} refuses this client: {message.error}")
        if isinstance(message, wire.Unknown):  # It has loaded its model just now.
            connection.send(hello)
        elif isinstance(message, wire.Loading) and message.elapsed_s - logged_s >= LOADING_LOG_INTERVAL_S:
            logged_s = message.elapsed_s
            logger.info("The engine has been loading its model for %.0f s.", logged_s)
