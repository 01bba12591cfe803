"""The frontends as processes of their own, driven by other people's programs: curl, and two versions of the openai package."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import DEADLINE_S

ROOT = Path(__file__).parents[2]
SIMPLE = "cacheflow.entrypoints.simple_fastapi_frontend"
OPENAI = "cacheflow.entrypoints.openai.openai_frontend"
MODEL = "facebook/opt-125m"
SMALL = ("--kv-cache-memory", "0.05", "--disable-log-stats")

# As the quickstart has them.
GENERATE_CURL = """curl http://localhost:8001/generate \\
    -d '{
        "prompt": "San Francisco is a",
        "use_beam_search": true,
        "n": 4,
        "temperature": 0
    }'"""
MODELS_CURL = "curl http://localhost:8000/v1/models"
COMPLETIONS_CURL = """curl http://localhost:8000/v1/completions \\
    -H "Content-Type: application/json" \\
    -d '{
        "model": "facebook/opt-125m",
        "prompt": "San Francisco is a",
        "max_tokens": 7,
        "temperature": 0
    }'"""


class Program:
    """A Python module that runs as a process, with its output in files."""

    def __init__(self, folder: Path, module: str, *arguments: str, hub_cache: Path, code: str | None = None) -> None:
        folder.mkdir(parents=True)
        self._out, self._err = folder / "out", folder / "err"
        self.command = [sys.executable, *(("-m", module) if code is None else ("-c", code)), *arguments]
        environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=err, cwd=ROOT, env=environment, text=True)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for_url(self) -> str:
        """The address that it prints when it is ready."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if " at http://" in self.out:
                return self.out.split(" at ")[1].strip()
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{self.command} did not come up:\n{self.err}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def simple_url(tmp_path_factory: pytest.TempPathFactory, hub_cache: Path) -> Iterator[str]:
    program = Program(tmp_path_factory.mktemp("programs") / "simple", SIMPLE, "--port", "0", *SMALL, hub_cache=hub_cache)
    try:
        yield program.wait_for_url()
    finally:
        program.stop()


@pytest.fixture(scope="module")
def openai_url(tmp_path_factory: pytest.TempPathFactory, hub_cache: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("programs") / "openai"
    program = Program(folder, OPENAI, "--model", MODEL, "--port", "0", *SMALL, hub_cache=hub_cache)
    try:
        yield program.wait_for_url()
    finally:
        program.stop()


def run_curl(command: str, url: str) -> Any:
    """Runs a command of the quickstart with the port replaced."""
    for base in ("http://localhost:8000", "http://localhost:8001"):
        command = command.replace(base, url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    return json.loads(done.stdout)


def run_client(client: str, script: str, *arguments: str) -> str:
    """Runs an example with an openai package in an environment of its own."""
    python = ROOT / ".venvs" / client / "bin" / "python"
    assert python.exists(), f"{python} is missing: run .ci/clients, which needs the network once."
    done = subprocess.run([python, ROOT / "examples" / script, *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status_of(url: str) -> int:
    """The status of an answer, or 0 while nothing listens there."""
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError:
        return 0


def wait_until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def child_pids(pid: int) -> list[int]:
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_quickstarts_generate_curl_gives_four_beams(simple_url: str) -> None:
    texts = run_curl(GENERATE_CURL, simple_url)["text"]
    assert len(texts) == 4
    assert all(text.startswith("San Francisco is a") and len(text) > len("San Francisco is a") for text in texts)


def test_curl_streams_texts_that_grow(simple_url: str) -> None:
    body = json.dumps({"prompt": "San Francisco is a", "stream": True, "temperature": 0})
    done = subprocess.run(
        ["curl", "-sN", f"{simple_url}/generate", "-d", body], capture_output=True, check=True, timeout=DEADLINE_S
    )
    texts = [json.loads(document)["text"][0] for document in done.stdout.split(b"\0")[:-1]]
    assert len(texts) > 1
    assert texts == sorted(texts, key=len)
    assert run_curl(f"curl {simple_url}/generate -d '{json.dumps({**json.loads(body), 'stream': False})}'", simple_url) == {
        "text": [texts[-1]]
    }


def test_the_quickstarts_models_curl_lists_the_model(openai_url: str) -> None:
    assert [model["id"] for model in run_curl(MODELS_CURL, openai_url)["data"]] == [MODEL]


def test_the_quickstarts_completions_curl_completes(openai_url: str) -> None:
    answer = run_curl(COMPLETIONS_CURL, openai_url)
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_simple_clients_example_runs(simple_url: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "simple_fastapi_client.py", "--base-url", simple_url],
        capture_output=True, text=True, timeout=DEADLINE_S, check=True,
    )  # fmt: skip
    assert done.stdout.count("San Francisco is a") == 6


def test_the_current_openai_package_is_served(openai_url: str) -> None:
    printed = run_client("openai-current", "openai_client.py", "--base-url", f"{openai_url}/v1", "--model", MODEL)
    assert f"Models: ['{MODEL}']" in printed
    assert "Completion 1 (" in printed
    assert "Usage: CompletionUsage(completion_tokens=" in printed
    assert "Beam 3:" in printed


def test_the_openai_package_of_2023_is_served(openai_url: str) -> None:
    printed = run_client("openai-0.28", "openai_legacy_client.py", "--base-url", f"{openai_url}/v1", "--model", MODEL)
    assert '"object": "text_completion"' in printed
    assert "As it grows:" in printed


def test_two_frontends_share_an_engine_and_clients_that_go_free_its_blocks(
    tmp_path: Path, hub_cache: Path, long_llama: Path
) -> None:
    from cacheflow import AsyncLLMServer

    address = f"ipc://{tmp_path}/engine"
    engine_arguments = ("engine", "--model", str(long_llama), "--listen", address, *SMALL)
    programs = [Program(tmp_path / "engine-logs", "cacheflow", *engine_arguments, hub_cache=hub_cache)]
    for name, module in (("simple", SIMPLE), ("openai", OPENAI)):
        programs.append(Program(tmp_path / name, module, "--engine", address, "--port", "0", hub_cache=hub_cache))
    try:
        simple, openai = (program.wait_for_url() for program in programs[1:])
        long = {"prompt": "Hello", "stream": True, "max_tokens": 15_000, "ignore_eos": True, "n": 2}
        curls = [
            subprocess.Popen(
                ["curl", "-sN", url, "-H", "content-type: application/json", "-d", json.dumps(body)], stdout=subprocess.PIPE
            )
            for url, body in (
                (f"{simple}/generate", long),
                (f"{openai}/v1/completions", long),
                (f"{simple}/generate", {**long, "stream": False}),
            )
        ]

        async def blocks_are_free() -> None:
            async with await AsyncLLMServer.connect(address) as engine:
                for curl in curls[:2]:
                    assert curl.stdout is not None
                    await asyncio.to_thread(curl.stdout.read1, 1)  # type: ignore[attr-defined]
                while (await engine.stats()).num_running < 3:
                    await asyncio.sleep(0.01)
                for curl in curls:
                    curl.kill()
                while (await engine.stats()).num_running:
                    await asyncio.sleep(0.01)
                stats = await engine.stats()
                assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
                assert stats.num_generated_tokens < 3 * 2 * 15_000, "the requests ended by themselves"

        asyncio.run(asyncio.wait_for(blocks_are_free(), DEADLINE_S))
        for curl in curls:
            curl.communicate()
    finally:
        for program in reversed(programs):
            assert program.stop() == 0
    assert not (tmp_path / "engine").exists(), "the socket's file was left behind"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_frontend_is_alive_while_it_loads_and_ends_in_order(tmp_path: Path, hub_cache: Path, number: signal.Signals) -> None:
    port = free_port()
    program = Program(tmp_path / "program", SIMPLE, "--port", str(port), *SMALL, hub_cache=hub_cache)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (alive := status_of(f"http://localhost:{port}/health")) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (alive, status_of(f"http://localhost:{port}/health/ready")) == (200, 503)
        url = program.wait_for_url()
        assert url == f"http://localhost:{port}"
        assert status_of(f"{url}/health/ready") == 200
        children = child_pids(program.process.pid)
        assert children
        assert program.stop(number) == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert "Traceback" not in program.err
    finally:
        program.stop()


@pytest.mark.parametrize(("module", "path"), [(SIMPLE, "/generate"), (OPENAI, "/v1/completions")])
def test_when_the_engine_is_killed_streams_go_on_to_the_same_text(
    tmp_path: Path, hub_cache: Path, long_llama: Path, module: str, path: str
) -> None:
    model = ("--model", str(long_llama), "--dtype", "float32")
    program = Program(tmp_path / "program", module, *model, "--port", "0", *SMALL, hub_cache=hub_cache)
    try:
        url = program.wait_for_url()
        fields = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
        command = ["curl", "-sN", url + path, "-H", "content-type: application/json", "-d"]
        whole = subprocess.run([*command, json.dumps(fields)], capture_output=True, timeout=DEADLINE_S, check=True)
        with subprocess.Popen([*command, json.dumps(fields | {"stream": True})], stdout=subprocess.PIPE) as curl:
            assert curl.stdout is not None
            first = curl.stdout.read(1)
            for pid in child_pids(program.process.pid):
                os.kill(pid, signal.SIGKILL)
            streamed = (first + curl.stdout.read()).decode()
        if module == SIMPLE:
            assert json.loads(streamed.split("\0")[-2]) == json.loads(whole.stdout)
        else:
            events = streamed.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
            text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
            assert text == json.loads(whole.stdout)["choices"][0]["text"]
        assert status_of(f"{url}/health") == 200
        wait_until(lambda: status_of(f"{url}/health/ready") == 200)
        assert program.stop() == 0
    finally:
        program.stop()


def test_a_frontend_whose_engine_keeps_dying_ends_and_says_why(tmp_path: Path, hub_cache: Path) -> None:
    program = Program(tmp_path / "program", SIMPLE, "--port", "0", *SMALL, hub_cache=hub_cache)
    try:
        program.wait_for_url()
        killed: set[int] = set()
        for _ in range(4):
            wait_until(lambda: bool(set(child_pids(program.process.pid)) - killed))
            for pid in set(child_pids(program.process.pid)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        assert program.process.wait(DEADLINE_S) == 1
        assert program.err.splitlines()[-1].startswith("Error: The engine process ")
        assert "was ended by SIGKILL, 4 times in a row" in program.err.splitlines()[-1]
    finally:
        program.stop()


@pytest.mark.parametrize(("module", "path"), [(SIMPLE, "/generate"), (OPENAI, "/v1/completions")])
def test_answers_that_outlast_the_grace_end_with_an_error_of_their_own(
    tmp_path: Path, hub_cache: Path, long_llama: Path, module: str, path: str
) -> None:
    options = ("--model", str(long_llama), "--port", "0", "--drain-timeout", "0", *SMALL)
    program = Program(tmp_path / "program", module, *options, hub_cache=hub_cache)
    try:
        url = program.wait_for_url()
        long = {"prompt": "Hello", "max_tokens": 15_000, "ignore_eos": True, "n": 2, "temperature": 0}
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("localhost", port)) as whole:
            body = json.dumps(long).encode()
            whole.sendall(b"POST %s HTTP/1.1\r\nhost: [::1]\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
            command = ["curl", "-sN", url + path, "-H", "content-type: application/json", "-d"]
            with subprocess.Popen([*command, json.dumps(long | {"stream": True})], stdout=subprocess.PIPE) as curl:
                assert curl.stdout is not None
                first = curl.stdout.read(1)
                assert program.stop() == 0
                streamed = (first + curl.stdout.read()).decode()
            assert curl.returncode == 0
            whole.settimeout(DEADLINE_S)
            head, _, document = whole.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        error = json.loads(document)["error"]
        assert "did not finish within 0 s" in error["message"]
        assert b"retry-after: 1" in head.lower()
        if module == SIMPLE:
            last = streamed.split("\0")[-2]
        else:
            assert streamed.endswith("data: [DONE]\n\n")
            last = streamed.split("\n\n")[-3].removeprefix("data: ")
        assert json.loads(last)["error"] == error
    finally:
        program.stop()


def test_an_example_without_a_server_says_so_in_a_sentence() -> None:
    url = f"http://localhost:{free_port()}"
    for python, script in (
        (sys.executable, "simple_fastapi_client.py"),
        (ROOT / ".venvs" / "openai-current" / "bin" / "python", "openai_client.py"),
    ):
        done = subprocess.run(
            [python, ROOT / "examples" / script, "--base-url", url], capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 1
        assert done.stderr.startswith("No server answers (")
        assert done.stderr.count("\n") == 1


def test_a_taken_port_is_one_sentence(tmp_path: Path, hub_cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        program = Program(tmp_path / "program", SIMPLE, "--port", str(port), hub_cache=hub_cache)
        assert program.process.wait(DEADLINE_S) == 1
    assert program.err == f"Error: Port {port} of localhost is in use. Choose another with --port, or end what listens there.\n"


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_message(tmp_path: Path, hub_cache: Path) -> None:
    program = Program(tmp_path / "program", OPENAI, "--port", "0", "--model", str(tmp_path / "missing"), hub_cache=hub_cache)
    assert program.process.wait(DEADLINE_S) == 1
    assert program.err.splitlines()[-1].startswith("Error: ")
    assert "missing" in program.err
    assert "Traceback" not in program.err


def test_options_of_a_new_engine_are_refused_beside_a_running_one(tmp_path: Path, hub_cache: Path) -> None:
    program = Program(tmp_path / "program", OPENAI, "--engine", f"ipc://{tmp_path}/x", "--model", MODEL, hub_cache=hub_cache)
    assert program.process.wait(DEADLINE_S) == 2
    assert "--model is for a new engine" in program.err


@pytest.mark.parametrize("module", [SIMPLE, OPENAI])
def test_the_help_is_shown_without_torch(module: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--max-num-seqs" in done.stdout
