"""The engine as a real child process, or as a service of its own, with a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheflow import async_server
from cacheflow.async_server import AsyncLLMServer
from cacheflow.config import EngineConfig
from cacheflow.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestFailedError,
)
from cacheflow.service import supervisor
from cacheflow.types import EngineStats, RequestOutput, SamplingParams

PATIENCE_S = 240.0
"""Until what must happen is taken not to happen."""
ENDLESS = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
"""With `long_llama` for 20 s and more."""
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)

SERVE = """
import sys
from cacheflow.config import EngineConfig
from cacheflow.service.process import serve
serve(EngineConfig(model=sys.argv[1]), sys.argv[2])
"""
"""What `cacheflow engine --listen` does."""

PARENT = """
import asyncio, sys
from cacheflow import AsyncLLMServer
from cacheflow.config import EngineConfig

async def main():
    server = await AsyncLLMServer.start(EngineConfig(model=sys.argv[1]))
    print(server._process._process.pid, server._process.address, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""
"""A program that starts an engine and is killed."""
READER = """
import asyncio, sys
from cacheflow import AsyncLLMServer, SamplingParams

async def main():
    server = await AsyncLLMServer.connect(sys.argv[1])
    while True:
        async for output in server.generate("hello", SamplingParams(max_tokens=None, ignore_eos=True)):
            print("a token", flush=True)

asyncio.run(main())
"""
"""A client that is killed."""
REMOTE = """
import asyncio, sys
from cacheflow import AsyncLLMServer, SamplingParams

async def main():
    async with await AsyncLLMServer.connect(sys.argv[1]) as server:
        async for output in server.generate("hello", SamplingParams(max_tokens=2)):
            pass
    print("torch" in sys.modules, "transformers" in sys.modules, output.finished)

asyncio.run(main())
"""
"""What a frontend on a remote engine does."""


class Service:
    """An engine that runs as a service of its own."""

    def __init__(self, model: Path, address: str) -> None:
        self.address = address
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, str(model), address])

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def service(long_llama: Path) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        service = Service(long_llama, f"ipc://{folder}/e.sock")
        yield service
        if service.process.poll() is None:
            assert service.end() == 0


def with_server(
    making: Callable[[], Coroutine[Any, Any, AsyncLLMServer]], work: Callable[[AsyncLLMServer], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        async with await asyncio.wait_for(making(), PATIENCE_S) as server:
            await asyncio.wait_for(work(server), PATIENCE_S)

    asyncio.run(main())


async def last_output(
    server: AsyncLLMServer, prompt: str | list[int], params: SamplingParams, request_id: str | None = None
) -> RequestOutput:
    return [output async for output in server.generate(prompt, params, request_id)][-1]


async def stats_when(server: AsyncLLMServer, is_so: Callable[[EngineStats], bool]) -> EngineStats:
    while not is_so(stats := await server.stats()):
        await asyncio.sleep(0.01)
    return stats


def test_a_long_text_is_tokenised_beside_the_event_loop(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    async def work(server: AsyncLLMServer) -> None:
        encode = server.tokenizer.encode
        monkeypatch.setattr(server.tokenizer, "encode", lambda text: threads.append(threading.current_thread()) or encode(text))
        short = await last_output(server, "Hello", GREEDY)
        monkeypatch.setattr(async_server, "LONG_TEXT", 4)
        long = await last_output(server, "Hello", GREEDY)
        assert long.outputs[0].token_ids == short.outputs[0].token_ids
        with pytest.raises(InvalidRequestError):
            await last_output(server, "Hello" * 2 * server.model_info.max_model_len, GREEDY)

    with_server(lambda: AsyncLLMServer.connect(service.address), work)
    assert threads[0] is threading.main_thread()
    assert threading.main_thread() not in threads[1:]


def is_idle(stats: EngineStats) -> bool:
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def has_ended(pid: int) -> bool:
    # A zombie that nobody has waited for yet has ended too.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


# --- a service of its own -------------------------------------------------------------------------------------------


def test_a_text_streams_and_grows_to_its_end(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        outputs = [output async for output in server.generate("hello there", GREEDY, "my-id")]
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == sorted(lengths)
        last = outputs[-1]
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert (last.request_id, last.prompt) == ("my-id", "hello there")
        assert last.prompt_token_ids == server.tokenizer.encode("hello there")
        assert len(last.outputs[0].token_ids) == 8
        assert last.outputs[0].finish_reason == "length"
        assert last.outputs[0].text == server.tokenizer.decode(last.outputs[0].token_ids)

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_two_clients_share_one_engine_and_greedy_texts_agree(service: Service) -> None:
    async def work(first: AsyncLLMServer) -> None:
        async with await AsyncLLMServer.connect(service.address) as second:
            results = await asyncio.gather(*(last_output(s, "hello", GREEDY, "same id") for s in (first, second)))
            assert results[0].outputs[0].token_ids == results[1].outputs[0].token_ids
            assert first.model_info == second.model_info
        assert (await last_output(first, "hello", GREEDY)).outputs[0].token_ids == results[0].outputs[0].token_ids

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_beams_come_at_the_end_best_first(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        params = SamplingParams(n=4, use_beam_search=True, temperature=0.0, max_tokens=6, ignore_eos=True)
        beams = (await last_output(server, "San Francisco is a", params)).outputs
        assert len({tuple(beam.token_ids) for beam in beams}) == 4
        scores = [beam.cumulative_logprob for beam in beams]
        assert scores == sorted(scores, reverse=True)

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_a_seed_makes_the_same_text_and_its_absence_another(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        async def tokens(seed: int | None) -> list[int]:
            params = SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)
            return (await last_output(server, "hello", params)).outputs[0].token_ids

        assert await tokens(5) == await tokens(5)
        assert await tokens(None) != await tokens(None)

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_a_stop_string_ends_the_request_in_the_engine_too(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        text = (await last_output(server, "hello", GREEDY)).outputs[0].text
        stop = text[2]
        params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True, stop=[stop])
        stopped = (await last_output(server, "hello", params)).outputs[0]
        assert stopped.text == text[: text.index(stop)]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        await stats_when(server, is_idle)

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


@pytest.mark.parametrize("how", ["leave", "cancel", "abort"])
def test_an_aborted_request_has_freed_its_blocks_before_anything_else_is_answered(service: Service, how: str) -> None:
    async def work(server: AsyncLLMServer) -> None:
        outputs: list[RequestOutput] = []

        async def read() -> None:
            async with contextlib.aclosing(server.generate("hello", ENDLESS, "r")) as stream:
                async for output in stream:
                    outputs.append(output)
                    if how == "leave" and len(outputs) == 3:
                        break

        reading = asyncio.create_task(read())
        while len(outputs) < 3:
            await asyncio.sleep(0)
        if how == "cancel":
            reading.cancel()
        elif how == "abort":
            await server.abort("r")
        await asyncio.gather(reading, return_exceptions=True)
        assert is_idle(await server.stats())
        if how == "abort":
            assert outputs[-1].finished
            assert outputs[-1].outputs[0].finish_reason == "abort"

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_a_loop_that_is_left_by_break_aborts_its_request(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        async for _ in server.generate("hello", ENDLESS):
            break
        await stats_when(server, is_idle)

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_a_server_that_drains_is_not_ready_refuses_what_is_new_and_finishes_what_runs(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        outputs = server.generate("hello", replace(GREEDY, max_tokens=3000))
        await anext(outputs)
        view = await server.view()
        assert [r.num_sequences for r in view.requests if r.is_running] == [1]
        assert (server.is_ready, server.is_draining) == (True, False)
        draining = asyncio.create_task(server.drain(PATIENCE_S))
        await asyncio.sleep(0)
        assert (server.is_ready, server.is_draining) == (False, True)
        for late in (last_output(server, "late", GREEDY), server.embed("late")):
            with pytest.raises(EngineDrainingError):
                await late
        assert [output async for output in outputs][-1].outputs[0].finish_reason == "length"
        await draining

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_bad_requests_are_refused_before_they_are_sent(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        limit = server.model_info.max_model_len
        for prompt, params, message in (
            ("", GREEDY, "The prompt is empty"),
            ([], GREEDY, "The prompt is empty"),
            ([1] * limit, GREEDY, f"The prompt has {limit} tokens; .* takes at most {limit - 1}"),
            ([server.model_info.vocab_size], GREEDY, "token ids go from 0 to"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                server.generate(prompt, params)
        assert (await server.stats()).num_running == 0

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


def test_a_client_that_is_killed_frees_its_blocks(service: Service) -> None:
    async def work(server: AsyncLLMServer) -> None:
        client = subprocess.Popen([sys.executable, "-c", READER, service.address], stdout=subprocess.PIPE)
        assert client.stdout is not None
        await asyncio.to_thread(client.stdout.readline)
        client.kill()
        client.wait()
        client.stdout.close()
        await stats_when(server, is_idle)

    with_server(lambda: AsyncLLMServer.connect(service.address), work)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_in_order(long_llama: Path, number: signal.Signals) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        service = Service(long_llama, f"ipc://{folder}/e.sock")

        async def work(server: AsyncLLMServer) -> None:
            reading = asyncio.create_task(last_output(server, "hello", ENDLESS))
            await stats_when(server, lambda stats: stats.num_running == 1)
            assert await asyncio.to_thread(service.end, number) == 0
            with pytest.raises(EngineDeadError):
                await reading

        with_server(lambda: AsyncLLMServer.connect(service.address, rejoin_timeout_s=0.1), work)


def test_a_service_on_a_port_of_this_machine_serves(tiny_opt: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = Service(tiny_opt, f"127.0.0.1:{port}")

    async def work(server: AsyncLLMServer) -> None:
        assert len((await last_output(server, "hello", GREEDY)).outputs[0].token_ids) == 8

    try:
        with_server(lambda: AsyncLLMServer.connect(f"tcp://localhost:{port}"), work)
    finally:
        assert service.end() == 0


def test_off_this_machine_neither_side_goes(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        asyncio.run(AsyncLLMServer.connect("tcp://192.0.2.1:5000"))
    done = subprocess.run([sys.executable, "-c", SERVE, str(tiny_llama), "tcp://0.0.0.0:5000"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "neither encrypted nor authenticated without a key" in done.stderr


# --- a supervised child ---------------------------------------------------------------------------------------------


def test_killing_the_engine_loses_no_token_and_repeats_none(long_llama: Path) -> None:
    long = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
    work = [
        ("hello", long),
        ("San Francisco is a", replace(long, temperature=1.0, seed=3, n=2, frequency_penalty=0.5, logprobs=2)),
        ("The capital of France", replace(long, n=2, stop=["the"], min_tokens=150)),
        ("There are 12 months", replace(long, prompt_logprobs=1, max_tokens=300)),
        ("def add(a, b):", replace(long, n=2, use_beam_search=True, max_tokens=60)),
    ]

    async def read(server: AsyncLLMServer, prompt: str, params: SamplingParams) -> RequestOutput:
        seen: dict[int, str] = {}
        async for output in server.generate(prompt, params):
            for completion in output.outputs:
                assert completion.text.startswith(seen.get(completion.index, ""))
                seen[completion.index] = completion.text
        return output

    async def main(num_kills: int) -> list[RequestOutput]:
        config = EngineConfig(model=str(long_llama), dtype="float32")
        async with await AsyncLLMServer.start(config) as server:
            readers = [asyncio.create_task(read(server, *item)) for item in work]
            for _ in range(num_kills):
                await stats_when(server, lambda stats: stats.num_generated_tokens > 60)
                assert server._process is not None
                os.kill(server._process._process.pid, signal.SIGKILL)
                while server.is_ready:
                    await asyncio.sleep(0.01)
                while not server.is_ready:
                    await asyncio.sleep(0.01)
            outputs = await asyncio.wait_for(asyncio.gather(*readers), PATIENCE_S)
            assert is_idle(await stats_when(server, is_idle))
        return outputs

    undisturbed, disturbed = asyncio.run(main(0)), asyncio.run(main(2))
    for expected, output in zip(undisturbed, disturbed, strict=True):
        assert [c.text for c in output.outputs] == [c.text for c in expected.outputs]
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]
        assert [c.finish_reason for c in output.outputs] == [c.finish_reason for c in expected.outputs]
        for completion, other in zip(output.outputs, expected.outputs, strict=True):
            assert completion.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-2)
            assert len(completion.logprobs or []) == len(other.logprobs or [])
        assert len(output.prompt_logprobs or []) == len(expected.prompt_logprobs or [])


DEADLY = """
import os, signal

class Deadly:
    CONTRACT_VERSION = 1
    priority = 0
    argmax_invariant = False

    @classmethod
    def from_params(cls, params, context):
        return cls() if params.extra.get("deadly") else None

    @classmethod
    def apply(cls, logits, rows):
        if any(len(row.output_token_ids) == 3 for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
"""
"""A logits processor that kills its process."""


def install(folder: Path, name: str, code: str, group: str, value: str) -> None:
    """Puts a distribution with one plugin into a folder of the Python path."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}:{value}\n")


def test_a_request_that_kills_its_engine_fails_alone(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "deadly", DEADLY, "cacheflow.logits_processors", "Deadly")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 0.0)
    long = replace(GREEDY, max_tokens=300)
    prompts = ["hello", "San Francisco is a", "The capital of France"]

    async def main(is_disturbed: bool) -> list[list[int]]:
        async with await AsyncLLMServer.start(EngineConfig(model=str(tiny_llama), dtype="float32")) as server:
            readers = [asyncio.create_task(last_output(server, prompt, long)) for prompt in prompts]
            if is_disturbed:
                with pytest.raises(RequestFailedError, match="died 3 times while it ran this request"):
                    await last_output(server, "The future", replace(long, extra={"deadly": True}))
            return [o.outputs[0].token_ids for o in await asyncio.gather(*readers)]

    assert asyncio.run(main(True)) == asyncio.run(main(False))


def test_a_request_that_hangs_its_engine_fails_alone(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = DEADLY.replace("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(1000)").replace("import os", "import time, os")
    install(tmp_path, "hanging", code, "cacheflow.logits_processors", "Deadly")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 0.0)

    async def main() -> None:
        async with await AsyncLLMServer.start(EngineConfig(model=str(tiny_llama), step_timeout=5.0)) as server:
            other = asyncio.create_task(last_output(server, "hello", replace(GREEDY, max_tokens=300)))
            with pytest.raises(RequestFailedError, match="died 3 times while it ran this request"):
                await last_output(server, "The future", replace(GREEDY, extra={"deadly": True}))
            assert len((await other).outputs[0].token_ids) == 300

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_an_engine_that_keeps_dying_is_given_up_and_leaves_nothing(long_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF_S", 0.0)
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 1)

    async def main() -> tuple[int, str]:
        server = await AsyncLLMServer.start(EngineConfig(model=str(long_llama)))
        process = server._process
        assert process is not None
        readers = [asyncio.create_task(last_output(server, "hello", ENDLESS)) for _ in range(4)]
        for _ in range(2):
            await stats_when(server, lambda stats: stats.num_running == 4)
            pid = process._process.pid
            os.kill(pid, signal.SIGKILL)
            while server.is_ready:
                await asyncio.sleep(0.01)
            while not server.is_ready and not all(r.done() for r in readers):
                await asyncio.sleep(0.01)
        results = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), PATIENCE_S)
        assert [type(r) for r in results] == [EngineDeadError] * 4
        assert "was ended by SIGKILL, 2 times" in str(results[0])
        with pytest.raises(EngineDeadError):
            await server.stats()
        await server.close()
        return pid, process._folder

    pid, folder = asyncio.run(main())
    assert has_ended(pid)
    assert not os.path.exists(folder)


def test_closing_ends_the_child_in_order_and_removes_its_folder(long_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_TIMEOUT_S", PATIENCE_S)

    async def main() -> None:
        server = await AsyncLLMServer.start(EngineConfig(model=str(long_llama)))
        process = server._process
        assert process is not None
        reading = asyncio.create_task(last_output(server, "hello", ENDLESS))
        await stats_when(server, lambda stats: stats.num_running == 1)
        await server.close()
        await server.close()
        assert process._process.returncode == 0
        assert not os.path.exists(process._folder)
        with pytest.raises(EngineDeadError, match="was closed"):
            await reading

    asyncio.run(main())


def test_a_missing_model_is_the_same_error_as_in_process(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelNotFoundError, match="/no/such/model"):
        asyncio.run(AsyncLLMServer.start(EngineConfig(model="/no/such/model")))
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_checkpoint_is_the_same_error_as_in_process(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(CheckpointError):
        asyncio.run(AsyncLLMServer.start(EngineConfig(model=str(tmp_path))))


def test_a_child_that_dies_while_loading_is_an_error(tiny_llama: Path) -> None:
    from cacheflow.service.supervisor import EngineProcess

    async def main() -> None:
        process = await EngineProcess.start(EngineConfig(model=str(tiny_llama)))
        process._process.kill()
        with pytest.raises(EngineDeadError, match=r"was ended by SIGKILL before it was ready"):
            await process.connect()
        await process.close()

    asyncio.run(main())


def test_cancelling_the_start_leaves_no_child(tiny_llama: Path) -> None:
    async def main() -> None:
        before = set(children())
        starting = asyncio.create_task(AsyncLLMServer.start(EngineConfig(model=str(tiny_llama))))
        while not (new := set(children()) - before):
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert all(has_ended(pid) for pid in new)

    asyncio.run(main())


def children() -> list[int]:
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in listed.split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_ends_with_its_parent_however_that_goes(tiny_llama: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_llama)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pid, address = parent.stdout.readline().split()
    parent.send_signal(number)
    parent.wait(PATIENCE_S)
    parent.stdout.close()
    wait_until(lambda: has_ended(int(pid)), "the engine outlives its parent")
    folder = os.path.dirname(address.removeprefix("ipc://"))
    wait_until(lambda: not os.path.exists(folder), "the engine leaves its folder behind")


# --- imports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["cacheflow.async_server", "cacheflow.service.client", "cacheflow.service.supervisor"])
def test_the_client_side_loads_neither_torch_nor_transformers(module: str) -> None:
    program = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert loaded.isdisjoint({"torch", "transformers", "cacheflow.core", "cacheflow.scheduling", "numpy"})


def test_a_remote_frontend_serves_without_torch(service: Service) -> None:
    done = subprocess.run([sys.executable, "-c", REMOTE, service.address], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]
