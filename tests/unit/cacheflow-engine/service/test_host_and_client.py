"""The host and the client, each real, over a real socket; the core is real too, on an executor without a model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from simulated import SimulatedExecutor, next_token

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.errors import (
    ConfigError,
    EngineDeadError,
    EngineDrainingError,
    EngineOverloadedError,
    InvalidRequestError,
    ModelNotFoundError,
)
from cacheflow.service import backlog as backlog_module
from cacheflow.service import client as client_module
from cacheflow.service import host as host_module
from cacheflow.service import wire
from cacheflow.service.backlog import Backlog
from cacheflow.service.client import EngineClient
from cacheflow.service.host import Host
from cacheflow.service.keys import EngineKey
from cacheflow.service.process import _Reception, bind
from cacheflow.types import EngineRequest, EngineStats, RequestUpdate, SamplingParams

ENDLESS = 19_000
"""More tokens than any test waits for."""
LONG = 500
"""Tokens that a test can wait for."""
PATIENCE_S = 180.0
"""Until what must happen is taken not to happen."""


def make_core(cls: type[EngineCore] = EngineCore) -> EngineCore:
    config = EngineConfig(block_size=16, max_num_batched_tokens=64, max_num_seqs=16)
    return cls(config, SimulatedExecutor(2000, 16, 64, max_model_len=20_000))


class PacedCore(EngineCore):
    """Takes so many steps, and then none until it may take more, so that a test can look in between."""

    num_allowed: float = 0

    def step(self) -> list[RequestUpdate]:
        if self.num_allowed < 1:
            time.sleep(0.001)
            return []
        self.num_allowed -= 1
        return super().step()

    async def go_on(self) -> None:
        """Lets it take all steps, once it has taken those that it was allowed."""
        while self.num_allowed >= 1:
            await asyncio.sleep(0.01)
        self.num_allowed = math.inf


def make_paced_core(num_allowed: int) -> PacedCore:
    core = make_core(PacedCore)
    assert isinstance(core, PacedCore)
    core.num_allowed = num_allowed
    return core


class Engine:
    """A host in a thread of its own."""

    def __init__(self, address: str, core: EngineCore, backlog: Backlog | None = None) -> None:
        self.address = address
        self.error: EngineDeadError | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = bind(self._context, address)
        self.host = Host(core, self._socket, backlog=backlog)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._thread.join()
        self._context.term()
        held = sum(sum(client.num_bytes.values()) for client in self.host._clients.values())
        assert self.host._num_held_bytes == held, "bytes of requests were counted wrongly"

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self.host.serve_once(timeout_s=0.02)
        except EngineDeadError as error:
            self.error = error
        finally:
            self._socket.close(0)


@contextlib.contextmanager
def engine_at(address: str, core: EngineCore | None = None, backlog: Backlog | None = None) -> Iterator[Engine]:
    engine = Engine(address, core or make_core(), backlog)
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture
def address() -> Iterator[str]:
    # pytest's own folders may be too deep for a socket's path.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield f"ipc://{folder}/run/e.sock"


@pytest.fixture
def engine(address: str) -> Iterator[Engine]:
    with engine_at(address) as engine:
        yield engine


class RawClient:
    """A DEALER socket that says what it likes."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(address)

    def say(self, data: bytes | wire.ClientMessage) -> None:
        self._socket.send(data if isinstance(data, bytes) else wire.encode_client_message(data))

    def hear(self) -> wire.EngineMessage:
        assert self._socket.poll(PATIENCE_S * 1000), "the engine says nothing"
        return wire.decode_engine_message(self._socket.recv())

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def raw(engine: Engine) -> Iterator[RawClient]:
    client = RawClient(engine.address)
    yield client
    client.close()


def with_client(
    address: str, work: Callable[[EngineClient], Coroutine[Any, Any, None]], rejoin_timeout_s: float = PATIENCE_S
) -> None:
    async def main() -> None:
        client = await EngineClient.connect(address, timeout_s=PATIENCE_S, rejoin_timeout_s=rejoin_timeout_s)
        try:
            await asyncio.wait_for(work(client), PATIENCE_S)
        finally:
            await client.close()

    asyncio.run(main())


def request(request_id: str = "r", max_tokens: int = 5, prompt: list[int] | None = None) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt or [1, 2, 3], params=params, arrival_s=0.0)


async def tokens_of(client: EngineClient, a_request: EngineRequest) -> list[int]:
    return [t async for update in client.submit(a_request) for s in update.sequences for t in s.new_token_ids]


def expected_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


async def stats_when(client: EngineClient, is_so: Callable[[EngineStats], bool]) -> EngineStats:
    """The first reading for which something holds; `with_client` ends the wait."""
    while not is_so(stats := await client.stats()):
        await asyncio.sleep(0.01)
    return stats


def is_idle(stats: EngineStats) -> bool:
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def is_running(stats: EngineStats) -> bool:
    return stats.num_running == 1


# --- requests -----------------------------------------------------------------------------------------------------


def test_a_request_streams_its_tokens_and_ends_once(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        assert client.model_info.model == "simulated"
        updates = [update async for update in client.submit(request())]
        assert [u.finished for u in updates] == [False] * 4 + [True]
        assert [t for u in updates for t in u.sequences[0].new_token_ids] == expected_tokens([1, 2, 3], 5)

    with_client(engine.address, work)


def test_requests_of_two_clients_under_one_id_are_kept_apart(engine: Engine) -> None:
    async def work(first: EngineClient) -> None:
        second = await EngineClient.connect(engine.address)
        prompts = ([1, 2, 3], [4, 5, 6])
        results = await asyncio.gather(
            *(tokens_of(c, request("same", 20, p)) for c, p in zip((first, second), prompts, strict=True))
        )
        assert results == [expected_tokens(p, 20) for p in prompts]
        await second.close()

    with_client(engine.address, work)


def test_an_id_in_use_is_refused_and_free_again_after_the_end(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        stream = client.submit(request("r", ENDLESS))
        await stream.__anext__()
        with pytest.raises(InvalidRequestError, match="'r' is in use"):
            await tokens_of(client, request("r"))
        await stream.aclose()
        assert await tokens_of(client, request("r")) == expected_tokens([1, 2, 3], 5)

    with_client(engine.address, work)


def test_leaving_a_stream_frees_its_blocks(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        stream = client.submit(request("r", ENDLESS))
        await stream.__anext__()
        assert (await client.stats()).num_running == 1
        await stream.aclose()
        assert is_idle(await client.stats())

    with_client(engine.address, work)


def test_cancelling_a_caller_frees_its_blocks(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request("r", ENDLESS)))
        await stats_when(client, is_running)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert is_idle(await client.stats())

    with_client(engine.address, work)


def test_an_abort_ends_the_stream_with_a_last_update(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        stream = client.submit(request("r", ENDLESS))
        await stream.__anext__()
        client.abort("r")
        client.abort("never seen")
        rest = [update async for update in stream]
        assert rest[-1].finished
        assert rest[-1].error is None
        assert is_idle(await client.stats())

    with_client(engine.address, work)


def test_an_abort_of_one_sequence_lets_the_others_go_on(address: str) -> None:
    core = make_paced_core(1)

    async def work(client: EngineClient) -> None:
        params = SamplingParams(n=2, max_tokens=LONG, temperature=0.0, ignore_eos=True, seed=0)
        stream = client.submit(EngineRequest(request_id="r", prompt_token_ids=[1], params=params, arrival_s=0.0))
        await stream.__anext__()
        client.abort("r", index=0)
        await client.stats()  # The engine has heard of it by then.
        await core.go_on()
        lengths = {0: 1, 1: 1}
        async for update in stream:
            for sequence in update.sequences:
                lengths[sequence.index] += len(sequence.new_token_ids)
        assert lengths[0] < lengths[1] == LONG

    with engine_at(address, core):
        with_client(address, work)


def test_what_can_never_be_served_is_refused_with_the_cores_reason(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(InvalidRequestError, match="token id 99") as raised:
            await tokens_of(client, request(prompt=[99]))
        assert raised.value.param == "prompt"

    with_client(engine.address, work)


def test_a_full_waiting_room_refuses_as_overloaded_and_says_when_to_come_again(address: str) -> None:
    core = make_core()
    config = EngineConfig(max_waiting_requests=2, max_num_seqs=16)

    async def work(client: EngineClient) -> None:
        running = [asyncio.create_task(tokens_of(client, request(str(i), ENDLESS))) for i in range(16)]
        await stats_when(client, lambda stats: stats.num_running == 16)
        waiting = [asyncio.create_task(tokens_of(client, request(f"w{i}", 1))) for i in range(2)]
        await stats_when(client, lambda stats: stats.num_waiting == 2)
        with pytest.raises(EngineOverloadedError, match="2 requests with 6 tokens wait already") as raised:
            await tokens_of(client, request("too much"))
        assert 1 <= raised.value.retry_after_s <= 60
        for i in range(16):
            client.abort(str(i))
        assert [len(tokens) for tokens in await asyncio.gather(*waiting)] == [1, 1]
        await asyncio.gather(*running)

    with engine_at(address, core, backlog=Backlog(core, config)):
        with_client(address, work)


def test_an_engine_that_drains_tells_its_clients_finishes_what_runs_and_refuses_what_is_new(address: str) -> None:
    core = make_paced_core(1)

    async def work(client: EngineClient) -> None:
        running = asyncio.create_task(tokens_of(client, request("running", LONG)))
        await stats_when(client, is_running)
        engine.host.drain(PATIENCE_S)
        late = wire.pack_request(request("late"))
        client._connection.send(late)  # Before the client has heard of it.
        while not client.is_draining:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDrainingError):
            await tokens_of(client, request("new"))
        await core.go_on()
        assert len(await running) == LONG

    with engine_at(address, core) as engine:
        with_client(address, work)


def test_one_client_of_two_does_not_wait_behind_the_others_flood(address: str) -> None:
    core = PacedCore(EngineConfig(block_size=16, max_num_seqs=4), SimulatedExecutor(2000, 16, 2048))

    async def work(flooding: EngineClient) -> None:
        flood = [asyncio.create_task(tokens_of(flooding, request(str(i), 20))) for i in range(200)]
        await stats_when(flooding, lambda stats: stats.num_waiting == 200)
        other = await EngineClient.connect(address, timeout_s=PATIENCE_S)
        try:
            single = asyncio.create_task(tokens_of(other, request("single", 1)))
            await stats_when(other, lambda stats: stats.num_waiting == 201)
            # Its turn is the second, or the first seat that is free after it: in a step or 20. The flood takes 1,000.
            core.num_allowed = 40
            await single
            await core.go_on()
        finally:
            await other.close()
        await asyncio.gather(*flood)

    with engine_at(address, core):
        with_client(address, work)


def test_a_view_shows_who_holds_which_block_and_readings_come_in_order(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        async with contextlib.aclosing(client.submit(request(max_tokens=ENDLESS))) as updates:
            await anext(updates)
            view, stats, again = await asyncio.gather(client.view(), client.stats(), client.view())
            assert (view.requests[0].request_id, view.requests[0].client_id) == ("r", client.client_id)
            assert len(view.blocks) == view.stats.num_blocks == stats.num_blocks == 2000
            assert view.blocks.count(3) >= 1
            assert view.stats.num_steps <= stats.num_steps <= again.stats.num_steps

    with_client(engine.address, work)


def test_no_more_than_a_bounded_number_of_readings_wait_for_their_answers(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        asked = [client.stats() for _ in range(client_module.MAX_READINGS + 1)]
        *answers, last = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, EngineStats) for answer in answers)
        assert isinstance(last, EngineOverloadedError)
        assert isinstance(await client.stats(), EngineStats)

    with_client(engine.address, work)


def test_draining_refuses_what_is_new_and_waits_for_what_runs(address: str) -> None:
    core = make_paced_core(1)

    async def work(client: EngineClient) -> None:
        running = asyncio.create_task(tokens_of(client, request("running", max_tokens=LONG)))
        await stats_when(client, is_running)
        draining = asyncio.create_task(client.drain(PATIENCE_S))
        await asyncio.sleep(0)
        assert client.is_draining
        with pytest.raises(EngineDrainingError, match="takes nothing new"):
            await tokens_of(client, request("new"))
        assert not running.done()
        await core.go_on()
        await draining
        assert len(await running) == LONG

    with engine_at(address, core):
        with_client(address, work)


def test_what_outlasts_the_draining_ends_with_an_error_and_frees_its_blocks(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        running = asyncio.create_task(tokens_of(client, request("running", max_tokens=ENDLESS)))
        await stats_when(client, is_running)
        await client.drain(0.05)
        with pytest.raises(EngineDrainingError, match=r"did not finish within 0.05 s"):
            await running
        await stats_when(client, is_idle)

    with_client(engine.address, work)


def test_a_request_that_fails_tells_nothing_of_the_inside_and_hurts_no_other(address: str) -> None:
    config = EngineConfig(block_size=16, max_num_batched_tokens=64, max_num_seqs=16)
    core = EngineCore(config, SimulatedExecutor(2000, 16, 64, poison=9))

    async def work(client: EngineClient) -> None:
        async def last_of(a_request: EngineRequest) -> RequestUpdate:
            return [update async for update in client.submit(a_request)][-1]

        good, bad = await asyncio.gather(last_of(request("good")), last_of(request("bad", prompt=[9])))
        assert bad.error == "RuntimeError: The engine's log says more."
        assert good.error is None

    with engine_at(address, core):
        with_client(address, work)


class FailingCore(EngineCore):
    """Fails its first step, through no request's fault."""

    num_failures = 1

    def step(self) -> list[RequestUpdate]:
        if self.num_failures > 0:
            self.num_failures -= 1
            raise RuntimeError("no fault of a request")
        return super().step()


def test_a_step_that_fails_through_no_requests_fault_fails_those_in_flight_and_the_engine_goes_on(address: str) -> None:
    async def work(client: EngineClient) -> None:
        updates = [update async for update in client.submit(request("first"))]
        assert [u.error for u in updates] == ["The engine failed (RuntimeError); its log says more."]
        assert await tokens_of(client, request("second")) == expected_tokens([1, 2, 3], 5)
        assert is_idle(await client.stats())

    with engine_at(address, make_core(FailingCore)):
        with_client(address, work)


def test_an_engine_whose_steps_keep_failing_ends(address: str) -> None:
    core = make_core(FailingCore)
    core.num_failures = 99  # type: ignore[attr-defined]

    async def work(client: EngineClient) -> None:
        for _ in range(host_module.MAX_FAILED_STEPS - 1):
            await tokens_of(client, request())
        with pytest.raises(EngineDeadError):
            await tokens_of(client, request())

    with engine_at(address, core) as engine:
        with_client(address, work, rejoin_timeout_s=0.1)
    assert "3 steps in a row failed; the last: no fault of a request" in str(engine.error)


def test_an_update_too_large_for_a_message_fails_its_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(client: EngineClient) -> None:
        monkeypatch.setattr(wire, "MAX_ENGINE_MESSAGE_BYTES", 400)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, seed=0)
        long = EngineRequest(request_id="long", prompt_token_ids=[1] * 60, params=params, arrival_s=0.0)
        (update,) = [update async for update in client.submit(long)]
        assert update.error is not None
        assert "a client takes 400" in update.error
        assert len(await tokens_of(client, request(max_tokens=1))) == 1

    with_client(engine.address, work)


# --- clients that misbehave or vanish -------------------------------------------------------------------------------


def test_another_protocol_version_is_rejected_with_both_numbers(raw: RawClient) -> None:
    raw.say(wire.Hello(protocol_version=99, client_id="c"))
    answer = raw.hear()
    assert isinstance(answer, wire.Rejected)
    assert "version 99 of the protocol, this engine version 1" in answer.error


def test_a_client_id_that_is_empty_or_endless_is_rejected(raw: RawClient) -> None:
    for client_id in ("", "x" * 1000):
        raw.say(wire.Hello(wire.PROTOCOL_VERSION, client_id))
        assert isinstance(raw.hear(), wire.Rejected)


def test_who_has_not_said_hello_is_unknown(raw: RawClient) -> None:
    raw.say(wire.pack_request(request()))
    assert raw.hear() == wire.Unknown()


def test_malformed_messages_are_ignored_and_the_engine_goes_on(raw: RawClient, caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"", b"\xc1", b"\x80", os.urandom(64), b"\xdd\xff\xff\xff\xff"):
        raw.say(data)
    raw.say(wire.Hello(wire.PROTOCOL_VERSION, "c"))
    assert isinstance(raw.hear(), wire.Welcome)
    assert sum("is ignored" in r.message for r in caplog.records) == 5


def test_an_unreadable_request_is_refused_by_its_id(raw: RawClient) -> None:
    raw.say(wire.Hello(wire.PROTOCOL_VERSION, "c"))
    assert isinstance(raw.hear(), wire.Welcome)
    raw.say(b"\x83\xa4type\xa6Submit\xaarequest_id\xa1r\xa7request\x80")
    answer = raw.hear()
    assert isinstance(answer, wire.Refused)
    assert answer.request_id == "r"
    assert answer.is_invalid


def test_an_oversized_message_costs_its_sender_the_connection_and_nobody_else(engine: Engine, raw: RawClient) -> None:
    async def work(client: EngineClient) -> None:
        raw.say(b"x" * (wire.MAX_CLIENT_MESSAGE_BYTES + 1))
        assert await tokens_of(client, request()) == expected_tokens([1, 2, 3], 5)

    with_client(engine.address, work)


def start_endless_request(raw: RawClient, client_id: str) -> None:
    raw.say(wire.Hello(wire.PROTOCOL_VERSION, client_id))
    assert isinstance(raw.hear(), wire.Welcome)
    raw.say(wire.pack_request(request("r", ENDLESS)))
    assert isinstance(raw.hear(), wire.Updates)


def test_goodbye_aborts_the_clients_requests(engine: Engine, raw: RawClient) -> None:
    async def work(client: EngineClient) -> None:
        start_endless_request(raw, "c")
        raw.say(wire.Goodbye())
        await stats_when(client, is_idle)

    with_client(engine.address, work)


def test_a_client_that_vanishes_frees_its_blocks_with_its_next_update(engine: Engine) -> None:
    async def work(client: EngineClient) -> None:
        vanishing = RawClient(engine.address)
        start_endless_request(vanishing, "c")
        vanishing.close()
        await stats_when(client, is_idle)

    with_client(engine.address, work)


def test_a_silent_client_loses_its_lease_and_its_requests(
    engine: Engine, raw: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(client: EngineClient) -> None:
        start_endless_request(raw, "silent")
        engine.host._by_client_id["silent"].last_heard_s -= 1.1 * wire.LEASE_S
        await stats_when(client, is_idle)

    with_client(engine.address, work)
    assert "Client silent has been silent for 10 s; 1 requests aborted." in caplog.messages


def test_pings_keep_an_otherwise_silent_clients_lease(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(wire, "LEASE_S", 0.5)

    async def work(client: EngineClient) -> None:
        await asyncio.sleep(1.0)
        assert await tokens_of(client, request()) == expected_tokens([1, 2, 3], 5)

    with_client(engine.address, work)


def test_a_client_that_comes_back_takes_the_place_of_its_older_self(engine: Engine, raw: RawClient) -> None:
    async def work(client: EngineClient) -> None:
        start_endless_request(raw, "same")
        again = RawClient(engine.address)
        again.say(wire.Hello(wire.PROTOCOL_VERSION, "same"))
        assert isinstance(again.hear(), wire.Welcome)
        assert is_idle(await client.stats())
        again.close()

    with_client(engine.address, work)


# --- an engine that is not there ------------------------------------------------------------------------------------


def test_every_open_stream_gets_an_error_when_the_engine_goes_and_none_comes(address: str) -> None:
    engine = Engine(address, make_core())

    async def work(client: EngineClient) -> None:
        tasks = [asyncio.create_task(tokens_of(client, request(f"r{i}", ENDLESS))) for i in range(3)]
        await stats_when(client, lambda stats: stats.num_running == 3)
        await asyncio.to_thread(engine.stop)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [EngineDeadError] * 3
        assert "is gone" in str(results[0])
        assert not client.is_alive
        for late in (tokens_of(client, request("late")), client.stats()):
            with pytest.raises(EngineDeadError, match="is gone"):
                await late

    with_client(address, work, rejoin_timeout_s=0.1)


def test_streams_go_on_in_the_next_engine_without_a_missing_or_a_second_token(address: str) -> None:
    cores = [make_paced_core(60) for _ in range(3)]
    engines = [Engine(address, cores[0])]

    async def work(client: EngineClient) -> None:
        requests = [request(f"r{i}", LONG, [8 + i, 9]) for i in range(5)]
        tasks = [asyncio.create_task(tokens_of(client, r)) for r in requests]
        for _ in range(2):
            await stats_when(client, lambda stats: stats.num_generated_tokens > 20)
            await asyncio.to_thread(engines[-1].stop)
            core = cores[len(engines)]
            late = asyncio.create_task(tokens_of(client, request(f"late {len(engines)}")))
            engines.append(await asyncio.to_thread(Engine, address, core))
            while not late.done():  # It may arrive when the others have taken all the steps that were allowed.
                core.num_allowed = max(core.num_allowed, 1)
                await asyncio.sleep(0.01)
            assert await late == expected_tokens([1, 2, 3], 5)
        await cores[-1].go_on()
        for task, r in zip(tasks, requests, strict=True):
            assert await task == expected_tokens(r.prompt_token_ids, LONG)
        assert is_idle(await client.stats())

    try:
        with_client(address, work)
    finally:
        engines[-1].stop()


def test_a_client_that_gave_its_engine_up_takes_requests_again_when_one_is_there(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "REJOIN_PAUSE_S", 0.01)
    engines = [Engine(address, make_core())]

    async def work(client: EngineClient) -> None:
        await asyncio.to_thread(engines[-1].stop)
        with pytest.raises(EngineDeadError, match="is gone"):
            await tokens_of(client, request("lost"))
        engines.append(await asyncio.to_thread(Engine, address, make_core()))
        while not client.is_alive:
            await asyncio.sleep(0.01)
        assert await tokens_of(client, request()) == expected_tokens([1, 2, 3], 5)
        assert is_idle(await client.stats())

    try:
        with_client(address, work, rejoin_timeout_s=0.3)
    finally:
        engines[-1].stop()


def test_what_comes_while_the_engine_is_away_is_bounded_here_and_by_the_next_ones_waiting_room(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_UNSENT", 40)
    engines = [Engine(address, make_paced_core(3))]

    async def work(client: EngineClient) -> None:
        before = asyncio.create_task(tokens_of(client, request("before", LONG)))
        await stats_when(client, lambda stats: stats.num_running == 1)
        await asyncio.to_thread(engines[-1].stop)
        while client.is_alive:
            await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(tokens_of(client, request(f"r{i}"))) for i in range(41)]
        await asyncio.sleep(0)
        with pytest.raises(EngineOverloadedError, match="40 requests wait for another one"):
            await tasks[-1]
        core = make_core()
        backlog = Backlog(core, EngineConfig(max_waiting_requests=0))
        backlog._max_num_sequences = 10
        engines.append(await asyncio.to_thread(Engine, address, core, backlog))
        results = await asyncio.gather(*tasks[:-1], return_exceptions=True)
        refused = [r for r in results if isinstance(r, EngineOverloadedError)]
        assert refused
        assert all(r == expected_tokens([1, 2, 3], 5) for r in results if r not in refused)
        assert await before == expected_tokens([1, 2, 3], LONG)

    try:
        with_client(address, work)
    finally:
        engines[-1].stop()


def test_an_embedding_survives_its_engine_and_its_engines_draining(address: str) -> None:
    engines = [Engine(address, make_paced_core(3))]
    next_core = make_paced_core(3)

    async def work(client: EngineClient) -> None:
        long = replace(request("embed", prompt=[1] * 19_000), task="embed")

        async def embed() -> list[RequestUpdate]:
            return [update async for update in client.submit(long)]

        embedding = asyncio.create_task(embed())
        await stats_when(client, lambda stats: stats.num_steps > 2)
        await asyncio.to_thread(engines[-1].stop)
        while client.is_alive:
            await asyncio.sleep(0.01)
        engines.append(await asyncio.to_thread(Engine, address, next_core))
        while not client.is_alive:
            await asyncio.sleep(0.01)
        await stats_when(client, lambda stats: stats.num_running == 1)
        engines[-1].host.drain(PATIENCE_S)
        next_core.num_allowed = math.inf
        (update,) = await embedding
        assert update.finished
        assert update.embedding == pytest.approx([297 / 19_000])  # The simulation's 1 for each of its chunks.
        assert is_idle(await client.stats())

    try:
        with_client(address, work)
    finally:
        engines[-1].stop()


def test_an_abort_while_the_engine_is_away_holds(address: str) -> None:
    engines = [Engine(address, make_core())]

    async def work(client: EngineClient) -> None:
        aborted, left = (asyncio.create_task(tokens_of(client, request(name, ENDLESS))) for name in ("aborted", "left"))
        await stats_when(client, lambda stats: stats.num_running == 2)
        await asyncio.to_thread(engines[-1].stop)
        while client.is_alive:
            await asyncio.sleep(0.01)
        client.abort("aborted")
        left.cancel()
        assert len(await aborted) < ENDLESS
        engines.append(await asyncio.to_thread(Engine, address, make_core()))
        while not client.is_alive:
            await asyncio.sleep(0.01)
        assert is_idle(await client.stats())

    try:
        with_client(address, work)
    finally:
        engines[-1].stop()


def test_nobody_at_the_address_is_an_error_in_the_stated_time(address: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(EngineDeadError, match=re.escape(f"No answer from an engine at {address} within 0.2 s")):
        asyncio.run(EngineClient.connect(address, timeout_s=0.2))
    assert time.monotonic() - start_s < PATIENCE_S


def test_waiting_for_an_engine_that_does_not_answer_is_told(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cacheflow"), pytest.raises(EngineDeadError):
        asyncio.run(EngineClient.connect(address, timeout_s=0.2))
    assert caplog.messages == [f"No answer from an engine at {address} yet; waiting up to 0.2 s for one."]


def test_a_client_may_come_before_the_engine(address: str) -> None:
    async def main() -> None:
        connecting = asyncio.create_task(EngineClient.connect(address, timeout_s=PATIENCE_S))
        await asyncio.sleep(0.05)
        with engine_at(address):
            client = await connecting
            assert await tokens_of(client, request()) == expected_tokens([1, 2, 3], 5)
            await client.close()

    asyncio.run(main())


def test_a_client_that_the_engine_has_forgotten_introduces_itself_again(address: str) -> None:
    core = make_paced_core(1)

    async def work(client: EngineClient) -> None:
        reading = asyncio.create_task(tokens_of(client, request("r", LONG)))
        await stats_when(client, lambda stats: stats.num_running == 1)
        with contextlib.closing(RawClient(address)) as raw:
            raw.say(wire.Hello(wire.PROTOCOL_VERSION, client.client_id))  # Takes its place, as after a lease that ran out.
            assert isinstance(await asyncio.to_thread(raw.hear), wire.Welcome)
            with pytest.raises(EngineDeadError, match="does not know this client any more"):
                await client.stats()
        await core.go_on()
        assert await reading == expected_tokens([1, 2, 3], LONG)

    with engine_at(address, core):
        with_client(address, work)


def test_an_error_of_the_connections_keeper_ends_streams_instead_of_leaving_them(
    engine: Engine, raw: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(client: EngineClient) -> None:
        reading = asyncio.create_task(tokens_of(client, request("r", ENDLESS)))
        await stats_when(client, lambda stats: stats.num_running == 1)
        monkeypatch.setattr(client_module, "parse_address", lambda address, has_key: "nonsense")
        raw.say(wire.Hello(wire.PROTOCOL_VERSION, client.client_id))
        assert isinstance(await asyncio.to_thread(raw.hear), wire.Welcome)
        with pytest.raises(EngineDeadError):
            await client.stats()
        with pytest.raises(EngineDeadError):
            await reading
        assert not client.is_alive

    with_client(engine.address, work)


# --- loading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reception_at(address: str) -> Iterator[tuple[zmq.Socket[bytes], _Reception]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = bind(context, address)
    reception = _Reception(router)
    try:
        yield router, reception
    finally:
        reception.close()
        router.close()
        context.term()


def test_a_client_waits_while_the_engine_loads_and_is_served_then(address: str) -> None:
    async def main() -> None:
        with reception_at(address) as (router, reception):
            connecting = asyncio.create_task(EngineClient.connect(address, timeout_s=2.0))
            await asyncio.sleep(2.5)  # Longer than a client waits for one that does not answer.
            assert not connecting.done()
            reception.close()
            host = Host(make_core(), router)
            host.greet(reception.identities)
            while not connecting.done():
                await asyncio.to_thread(host.serve_once, 0.05)
            await (await connecting).close()

    asyncio.run(main())


@pytest.mark.parametrize("comes_first", [True, False])
def test_a_load_error_reaches_the_client_whenever_it_comes(address: str, comes_first: bool) -> None:
    async def main() -> None:
        with reception_at(address) as (_, reception):
            connecting = asyncio.create_task(EngineClient.connect(address, timeout_s=PATIENCE_S))
            while comes_first and not reception.identities:
                await asyncio.sleep(0.01)
            reception.close()
            failure = wire.LoadFailed("ModelNotFoundError", "There is no model x.")
            await asyncio.to_thread(reception.tell, failure, not comes_first)
            with pytest.raises(ModelNotFoundError, match=r"There is no model x\."):
                await connecting

    asyncio.run(main())


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


def test_only_the_owner_may_enter_the_socket_and_its_folder(context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    with bind(context, address):
        path = Path(address.removeprefix("ipc://"))
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_address_in_use_is_refused(context: zmq.Context[zmq.Socket[bytes]], engine: Engine) -> None:
    with pytest.raises(ConfigError, match="Another process listens on"):
        bind(context, engine.address)


def test_requests_that_carry_too_much_together_are_refused_until_there_is_room(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MAX_HELD_BYTES", 5000)
    core = make_core()
    with engine_at(address, core, Backlog(core, EngineConfig())):

        async def work(client: EngineClient) -> None:
            params = SamplingParams(max_tokens=ENDLESS, ignore_eos=True, extra={"x": "y" * 4000})
            large = replace(request("a", ENDLESS), params=params)
            running = asyncio.create_task(tokens_of(client, large))
            await stats_when(client, lambda stats: stats.num_running == 1)
            with pytest.raises(EngineOverloadedError, match="and at most 5000 are taken"):
                await tokens_of(client, replace(large, request_id="b"))
            client.abort("a")
            await running
            another = asyncio.create_task(tokens_of(client, replace(large, request_id="c")))
            await stats_when(client, lambda stats: stats.num_running == 1)
            client.abort("c")
            await another

        with_client(address, work)


def test_a_file_that_is_no_socket_is_left_alone(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link", "."):
        with pytest.raises(ConfigError, match="is no socket"):
            bind(context, str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_port_in_use_is_refused(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with bind(context, "127.0.0.1:0") as taken, pytest.raises(ConfigError, match="Address already in use"):
        bind(context, taken.getsockopt_string(zmq.LAST_ENDPOINT))


def test_a_socket_that_a_dead_engine_left_behind_is_replaced(context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    path = Path(address.removeprefix("ipc://"))
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    bind(context, address).close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("client_key", ["same", "other", "none"])
def test_over_tcp_only_a_client_with_the_engines_key_is_served(tmp_path: Path, client_key: str) -> None:
    for name in ("same", "other"):
        EngineKey.make(str(tmp_path / name))
    address, key = f"tcp://127.0.0.1:{free_port()}", EngineKey.read(str(tmp_path / "same"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = key.admit_clients(context)
    listener = bind(context, address, key)

    async def main() -> list[int]:
        key_file = None if client_key == "none" else str(tmp_path / client_key)
        client = await EngineClient.connect(address, timeout_s=PATIENCE_S if client_key == "same" else 1.0, key_file=key_file)
        try:
            return await tokens_of(client, request())
        finally:
            await client.close()

    host = Host(make_core(), listener)
    is_stopping = threading.Event()

    def run() -> None:
        while not is_stopping.is_set():
            host.serve_once(timeout_s=0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if client_key == "same":
            assert len(asyncio.run(main())) == 5
        else:
            with pytest.raises(EngineDeadError, match="--engine-key"):
                asyncio.run(main())
    finally:
        is_stopping.set()
        thread.join()
        door.stop()
        listener.close(0)
        context.term()


def test_tcp_off_the_loopback_interface_is_not_bound(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with pytest.raises(ConfigError, match="neither encrypted nor authenticated"):
        bind(context, "tcp://0.0.0.0:5000")


def test_a_line_of_statistics_is_written_while_there_is_work(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_module, "LOG_STATS_INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, logger="cacheflow")
    with engine_at(address):

        async def work(client: EngineClient) -> None:
            await tokens_of(client, request())

        with_client(address, work)
    lines = [m for m in caplog.messages if m.startswith("Throughput")]
    assert lines
    assert re.fullmatch(
        r"Throughput: [\d.]+ prompt and [\d.]+ generated tokens/s. Running: 1, waiting: 0. KV cache: 0.1 % in use, "
        r"prefix hits: [\d.]+ %.",
        lines[0],
    )
    assert any(m == "Request r: 3 prompt tokens, 1 sequences." for m in caplog.messages)
