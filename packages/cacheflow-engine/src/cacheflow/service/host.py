"""An `EngineCore` behind a ROUTER socket, for any number of clients.

One thread owns the core. Between two steps it reads what the clients said; only when there is nothing to compute does it
wait for them. It knows token ids and messages, and no process: who made the socket and what ends the loop is `process`'s.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import zmq

from cacheflow.config import EngineConfig
from cacheflow.errors import EngineDeadError, EngineOverloadedError, InvalidRequestError
from cacheflow.service import wire
from cacheflow.service.backlog import Backlog
from cacheflow.service.journal import StepJournal
from cacheflow.service.watchdog import Watchdog
from cacheflow.types import EngineStats, RequestUpdate

if TYPE_CHECKING:
    from cacheflow.core import EngineCore

logger = logging.getLogger(__name__)

MAX_MESSAGES_PER_STEP = 1024
"""So that a flood of messages can't keep the engine from its steps."""
MAX_DEATHS = 2
"""A request that was in the running step of so many deaths of the engine runs alone; after one more it fails."""
MAX_FAILED_STEPS = 3
"""After this many steps in a row that failed through no request's fault, the process ends."""
LOG_STATS_INTERVAL_S = 5.0
DRAINING_RETRY_AFTER_S = 5.0
"""When another engine may be there, where there is one to be."""


@dataclass
class _Client:
    """A client with a lease.

    Attributes:
        identity: Where ZeroMQ sends its messages.
        client_id: Its own name for itself, which the core tells requests apart by.
        last_heard_s: On the monotonic clock.
        num_bytes: Of the message of each unfinished request, by its id. Each request gets exactly one last update.
    """

    identity: bytes
    client_id: str
    last_heard_s: float
    num_bytes: dict[str, int] = field(default_factory=dict)


class Host:
    """Serves a core to the clients of a socket. Not thread safe: the thread that calls `run` owns both.

    Args:
        core: What computes. The caller closes it.
        socket: A bound ROUTER socket, made by `process.bind`.
        log_stats: Write a line of statistics every 5 seconds while there is work.
        log_requests: Write a line for every request.
        journal: Records each step's requests, and knows those of an earlier engine's last one.
        backlog: Refuses what is too much; None: with the options' defaults.
        watchdog: Ends the process when a step hangs; None: nobody does.
    """

    def __init__(
        self,
        core: EngineCore,
        socket: zmq.Socket[bytes],
        *,
        log_stats: bool = True,
        log_requests: bool = True,
        journal: StepJournal | None = None,
        backlog: Backlog | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._core = core
        self._backlog = backlog or Backlog(core, EngineConfig())
        self._watchdog = watchdog or Watchdog(0.0)
        self._drained_by_s = math.inf
        self._is_draining = False
        self._socket = socket
        self._log_requests = log_requests
        self._clients: dict[bytes, _Client] = {}
        self._by_client_id: dict[str, _Client] = {}
        self._welcome = wire.encode_engine_message(wire.Welcome(wire.PROTOCOL_VERSION, core.info))
        self._num_held_bytes = 0  # Of all clients' unfinished requests.
        self._num_failed_steps = 0
        self._num_deaths = journal.num_deaths if journal is not None else {}
        if journal is not None:
            core.on_step = journal.write
        self._stats_log = _StatsLog(core) if log_stats else None

    @property
    def has_unfinished(self) -> bool:
        """Whether a client waits for anything."""
        return self._core.has_unfinished

    def drain(self, timeout_s: float) -> None:
        """From the next step on new requests are refused; `run` returns once the others have ended, or after `timeout_s`.

        A signal handler may call it.
        """
        self._drained_by_s = time.monotonic() + timeout_s

    def run(self) -> None:
        """Serves until it is drained, or an exception ends it: `SystemExit`, or an error that the engine can't survive.

        Raises:
            EngineDeadError: A worker is gone, or steps fail whatever is in them.
        """
        while not (self._is_draining and (not self.has_unfinished or time.monotonic() > self._drained_by_s)):
            self.serve_once()

    def serve_once(self, timeout_s: float = 1.0) -> None:
        """Reads what there is to read, then runs one step if there is work; without work it waits for a message."""
        is_busy = self._core.has_unfinished
        if not is_busy:
            self._watchdog.rest()
        if self._drained_by_s < math.inf and not self._is_draining:
            self._is_draining = True
            logger.info("The engine ends: it takes nothing new, and finishes what runs.")
            for client in list(self._clients.values()):
                self._send(client.identity, wire.encode_engine_message(wire.Draining()))
        self._receive(0.0 if is_busy or self._is_draining else timeout_s)
        self._end_leases()
        if self._core.has_unfinished:
            self._watchdog.renew()
            started_s = time.monotonic()
            updates = self._step()
            self._backlog.note_step(time.monotonic() - started_s)
            self._send_updates(updates)
        if self._stats_log is not None:
            self._stats_log.tick(is_busy)

    def greet(self, identities: Iterable[bytes]) -> None:
        """Tells clients that asked during loading to ask again now."""
        for identity in identities:
            self._send(identity, wire.encode_engine_message(wire.Unknown()))

    def _step(self) -> list[RequestUpdate]:
        try:
            updates = self._core.step()
        except EngineDeadError:
            raise
        except Exception as error:
            self._num_failed_steps += 1
            logger.exception("A step failed outside of any request (%d in a row).", self._num_failed_steps)
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise EngineDeadError(f"{self._num_failed_steps} steps in a row failed; the last: {error}") from error
            return self._fail_all(f"The engine failed ({type(error).__name__}); its log says more.")
        self._num_failed_steps = 0
        return updates

    def _fail_all(self, error: str) -> list[RequestUpdate]:
        updates = []
        for client in self._clients.values():
            for request_id in client.num_bytes:
                self._core.abort(request_id, client.client_id)
                updates.append(_last_update(client, request_id, error))
        return updates

    def _send_updates(self, updates: list[RequestUpdate]) -> None:
        by_client: dict[str, list[RequestUpdate]] = {}
        for update in updates:
            by_client.setdefault(update.client_id, []).append(update)
        for client_id, its_updates in by_client.items():
            client = self._by_client_id.get(client_id)
            if client is None:
                continue  # It left, and the core is yet to notice.
            for update in its_updates:
                if update.finished:
                    self._forget(client, update.request_id)
            try:
                data = wire.encode_engine_message(wire.Updates(its_updates))
            except wire.MalformedMessageError as error:
                logger.error("%s", error)
                for update in its_updates:
                    self._core.abort(update.request_id, client_id)
                    self._forget(client, update.request_id)
                failed = [_last_update(client, u.request_id, str(error)) for u in its_updates]
                data = wire.encode_engine_message(wire.Updates(failed))
            self._send(client.identity, data)

    def _receive(self, timeout_s: float) -> None:
        if timeout_s and not self._socket.poll(int(timeout_s * 1000)):
            return
        for _ in range(MAX_MESSAGES_PER_STEP):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = wire.decode_client_message(b"".join(frames))
            except wire.MalformedMessageError as error:
                logger.warning("A message from a client is ignored: %s", error)
                continue
            self._handle(identity, message)

    def _handle(self, identity: bytes, message: wire.ClientMessage) -> None:
        if isinstance(message, wire.Hello):
            self._hello(identity, message)
            return
        client = self._clients.get(identity)
        if client is None:
            if not isinstance(message, wire.Goodbye):
                self._send(identity, wire.encode_engine_message(wire.Unknown()))
            return
        client.last_heard_s = time.monotonic()
        if isinstance(message, wire.Submit):
            self._submit(client, message)
        elif isinstance(message, wire.Abort):
            self._abort(client, message)
        elif isinstance(message, wire.StatsRequest):
            self._send(identity, wire.encode_engine_message(wire.StatsReply(self._core.stats())))
        elif isinstance(message, wire.ViewRequest):
            self._send(identity, wire.encode_engine_message(wire.ViewReply(self._core.view())))
        elif isinstance(message, wire.Goodbye):
            self._drop(client, "said goodbye")

    def _hello(self, identity: bytes, message: wire.Hello) -> None:
        refusal = refuse_hello(message)
        if refusal is not None:
            self._send(identity, wire.encode_engine_message(refusal))
            return
        known = self._by_client_id.get(message.client_id)
        if known is None or known.identity != identity:
            if known is not None:
                self._drop(known, "came back on a new connection")
            client = _Client(identity, message.client_id, time.monotonic())
            self._clients[identity] = self._by_client_id[message.client_id] = client
            logger.debug("Client %s is here.", message.client_id)
        self._clients[identity].last_heard_s = time.monotonic()
        self._send(identity, self._welcome)
        if self._is_draining:
            self._send(identity, wire.encode_engine_message(wire.Draining()))

    def _submit(self, client: _Client, message: wire.Submit) -> None:
        refused: wire.Refused | None = None
        try:
            request = wire.unpack_request(message)
            num_deaths = self._num_deaths.get((client.client_id, message.request_id), 0) if message.is_again else 0
            if num_deaths > MAX_DEATHS:
                error = f"The engine died {num_deaths} times while it ran this request, the last time alone."
                refused = wire.Refused(message.request_id, error)
            elif self._is_draining and not message.is_again:
                error = "The engine is ending: it finishes what runs and takes nothing new. Try again soon."
                refused = wire.Refused(message.request_id, error, retry_after_s=DRAINING_RETRY_AFTER_S, is_draining=True)
            else:
                if not message.is_again:
                    self._backlog.check(request, len(message.request), self._num_held_bytes)
                # The identity of a client is not the request's to say, and a time that is none would upset the order.
                arrival_s = request.arrival_s if math.isfinite(request.arrival_s) else time.time()
                request = replace(request, client_id=client.client_id, arrival_s=arrival_s)
                self._core.add(request, is_alone=num_deaths == MAX_DEATHS)
        except InvalidRequestError as error:
            refused = wire.Refused(message.request_id, str(error), is_invalid=True, param=error.param)
        except EngineOverloadedError as error:
            refused = wire.Refused(message.request_id, str(error), retry_after_s=error.retry_after_s)
        except Exception as error:
            logger.exception("The request %s could not be added.", message.request_id)
            refused = wire.Refused(message.request_id, f"The engine failed ({type(error).__name__}); its log says more.")
        if refused is not None:
            self._send(client.identity, wire.encode_engine_message(refused))
            return
        self._forget(client, message.request_id)  # Should it have had one of that id, which ended untold.
        client.num_bytes[message.request_id] = len(message.request)
        self._num_held_bytes += len(message.request)
        if self._log_requests:
            num_tokens, num_sequences = len(request.prompt_token_ids), request.params.num_sequences
            logger.info("Request %s: %d prompt tokens, %d sequences.", message.request_id, num_tokens, num_sequences)

    def _abort(self, client: _Client, message: wire.Abort) -> None:
        if message.request_id not in client.num_bytes:
            return  # It has ended, and its last update is on its way.
        self._core.abort(message.request_id, client.client_id, message.index)
        if message.index is None:
            self._forget(client, message.request_id)
            updates = wire.Updates([_last_update(client, message.request_id)])
            self._send(client.identity, wire.encode_engine_message(updates))

    def _forget(self, client: _Client, request_id: str) -> None:
        self._num_held_bytes -= client.num_bytes.pop(request_id, 0)

    def _send(self, identity: bytes, data: bytes) -> None:
        try:
            self._socket.send_multipart((identity, data), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            client = self._clients.get(identity)
            if client is not None:
                self._drop(client, "does not read its messages" if error.errno == zmq.EAGAIN else "is gone")

    def _end_leases(self) -> None:
        oldest_s = time.monotonic() - wire.LEASE_S
        for client in [c for c in self._clients.values() if c.last_heard_s < oldest_s]:
            self._drop(client, f"has been silent for {wire.LEASE_S:.0f} s")

    def _drop(self, client: _Client, reason: str) -> None:
        del self._clients[client.identity], self._by_client_id[client.client_id]
        num_requests = len(client.num_bytes)
        for request_id in list(client.num_bytes):
            self._core.abort(request_id, client.client_id)
            self._forget(client, request_id)
        level = logging.WARNING if num_requests else logging.DEBUG
        logger.log(level, "Client %s %s; %d requests aborted.", client.client_id, reason, num_requests)


def refuse_hello(message: wire.Hello) -> wire.Rejected | None:
    """Why a client can't be served, or None when it can."""
    if message.protocol_version != wire.PROTOCOL_VERSION:
        return wire.Rejected(
            f"The client speaks version {message.protocol_version} of the protocol, this engine version "
            f"{wire.PROTOCOL_VERSION}. Install the same version of cacheflow-engine on both sides."
        )
    if not 0 < len(message.client_id) <= wire.MAX_CLIENT_ID_LENGTH:
        return wire.Rejected(f"A client id has 1 to {wire.MAX_CLIENT_ID_LENGTH} characters, not {len(message.client_id)}.")
    return None


def _last_update(client: _Client, request_id: str, error: str | None = None) -> RequestUpdate:
    return RequestUpdate(request_id=request_id, client_id=client.client_id, sequences=[], finished=True, error=error)


class _StatsLog:
    """The line of statistics: what has happened since the one before, or since there is work again."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._last: EngineStats | None = None
        self._last_s = 0.0

    def tick(self, is_busy: bool) -> None:
        """To be called between steps."""
        if not is_busy:
            self._last = None
            return
        now_s = time.monotonic()
        if self._last is None:
            self._last, self._last_s = self._core.stats(), now_s
        elif now_s - self._last_s >= LOG_STATS_INTERVAL_S:
            stats = self._core.stats()
            self._write(self._last, stats, now_s - self._last_s)
            self._last, self._last_s = stats, now_s

    def _write(self, last: EngineStats, stats: EngineStats, elapsed_s: float) -> None:
        num_prompt_tokens = stats.num_prompt_tokens - last.num_prompt_tokens
        num_cached_tokens = stats.num_cached_tokens - last.num_cached_tokens
        num_used_blocks = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
        logger.info(
            "Throughput: %.1f prompt and %.1f generated tokens/s. Running: %d, waiting: %d. KV cache: %.1f %% in use, "
            "prefix hits: %.1f %%.",
            num_prompt_tokens / elapsed_s,
            (stats.num_generated_tokens - last.num_generated_tokens) / elapsed_s,
            stats.num_running,
            stats.num_waiting,
            100 * num_used_blocks / max(stats.num_blocks, 1),
            100 * num_cached_tokens / max(num_prompt_tokens, 1),
        )
