"""Servers as processes of their own, in bad times: engines killed, frontends restarted, clients that go, too many requests."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from programs import DEADLINE_S, Program

NUM_STREAMS = 32
NUM_TOKENS = 150
NUM_SEATS = 8
"""Requests that run at a time. None may be in the running step of all three deaths, which would make it a suspect."""
PROMPTS = ("hello", "San Francisco is a", "The capital of France", "The future of AI is")


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own folders may be too deep for a socket's path.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


class Answer:
    """A request to a frontend, and what has come of it.

    Attributes:
        status: Of the answer, once it has begun.
        texts: The streamed texts, each with all before it.
        is_over: Whether all that will come has come.
    """

    def __init__(self, url: str, fields: dict[str, Any], path: str = "/generate") -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.texts: list[str] = []
        self.is_over = False
        self._fields = fields
        self._path = path
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=DEADLINE_S)

    def run(self, leave_after: int | None = None) -> Answer:
        """Sends it and reads to the end, or until so many pieces have come."""
        try:
            self._connection.request("POST", self._path, json.dumps(self._fields))
            response = self._connection.getresponse()
            self.status = response.status
            self.headers = {name.lower(): value for name, value in response.getheaders()}
            rest = b""
            while (data := response.read1(65536)) and (leave_after is None or len(self.texts) < leave_after):
                *pieces, rest = (rest + data).split(b"\0")
                self.texts += [piece.decode() for piece in pieces]
            self.texts += [rest.decode()] if rest else []
        finally:
            self._connection.close()
            self.is_over = True
        return self

    @property
    def last(self) -> Any:
        """The last piece, which holds the whole text."""
        return json.loads(self.texts[-1])


def get(url: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=DEADLINE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


def is_idle(url: str) -> bool:
    status, body = get(url, "/stats")
    engine = json.loads(body)["engine"] if status == 200 else {}
    return status == 200 and (
        engine["num_running"] == engine["num_waiting"] == 0
        and engine["num_free_blocks"] + engine["num_cached_blocks"] == engine["num_blocks"]
    )


def in_background(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


class Servers:
    """Starts engines and frontends on one address, and leaves none behind."""

    def __init__(self, folder: Path, tmp_path: Path, model: Path) -> None:
        self.address = f"ipc://{folder}/run/engine.sock"
        self.pids: list[int] = []
        self._logs = tmp_path
        self._model = model
        self._programs: list[Program] = []

    def start(self, *arguments: str) -> Program:
        program = Program(self._logs / f"{len(self._programs)}.log", self._logs, *arguments)
        self._programs.append(program)
        self.pids.append(program.process.pid)
        return program

    def engine(self, *arguments: str) -> Program:
        return self.start(
            "engine", "--model", str(self._model), "--listen", self.address, "--dtype", "float32", "--kv-cache-memory", "0.05",
            "--disable-log-requests", *arguments,
        )  # fmt: skip

    def frontend(self, name: str = "simple", *arguments: str) -> tuple[Program, str]:
        program = self.start("serve", name, "--engine", self.address, "--port", "0", *arguments)
        return program, "http://" + program.wait_for(" at http://")

    def close(self) -> None:
        for program in self._programs:
            program.process.kill()
            program.process.wait(DEADLINE_S)


@pytest.fixture
def servers(folder: Path, tmp_path: Path, long_llama: Path) -> Iterator[Servers]:
    servers = Servers(folder, tmp_path, long_llama)
    yield servers
    servers.close()


def test_every_stream_that_stays_ends_with_the_right_text_whatever_dies(servers: Servers, folder: Path) -> None:
    draw = random.Random(4)
    shared_before = set(os.listdir("/dev/shm"))
    engine = servers.engine("--max-num-seqs", str(NUM_SEATS))
    frontend, url = servers.frontend()
    other, other_url = servers.frontend()
    requests = [
        {
            "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True,
            "temperature": number % 2, "seed": number,
        }
        for number in range(NUM_STREAMS)
    ]  # fmt: skip
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        wanted = list(pool.map(lambda fields: Answer(other_url, fields).run().last, requests))
        answers = [Answer(url, fields) for fields in requests]
        leaving = set(draw.sample(range(NUM_STREAMS), NUM_STREAMS // 2))
        leave_after = [draw.randrange(1, NUM_TOKENS // 2) if number in leaving else None for number in range(NUM_STREAMS)]
        running = [pool.submit(answer.run, after) for answer, after in zip(answers, leave_after, strict=True)]
        begun: list[Answer] = []
        for num_over in (0, 10, 20):
            num_pieces = draw.randrange(20, 200) if num_over == 0 else 0
            wait_until(
                lambda over=num_over, pieces=num_pieces, begun=begun: (  # type: ignore[misc]
                    sum(a.is_over for a in answers) >= over
                    and sum(len(a.texts) for a in answers) >= pieces
                    and all(a.is_over for a in begun)
                ),
                "the streams stand still",
            )
            time.sleep(draw.random() / 10)
            begun = [a for a in answers if a.texts and not a.is_over]
            engine.process.kill()
            engine.process.wait(DEADLINE_S)
            engine = servers.engine("--max-num-seqs", str(NUM_SEATS))
            if num_over == 10:
                other.stop()
                assert other.process.returncode == 0
                other, other_url = servers.frontend()
        for number, future in enumerate(running):
            future.result(DEADLINE_S)
            if number not in leaving:
                assert answers[number].last == wanted[number], number
    assert Answer(other_url, requests[0]).run().last == wanted[0]
    wait_until(lambda: is_idle(url), "blocks stay in use")
    for program in (frontend, other, engine):
        program.stop()
        assert program.process.returncode == 0, program.log.read_text()
    assert not list((folder / "run").iterdir())
    assert not [pid for pid in servers.pids if Path(f"/proc/{pid}").exists()]
    left_behind = set(os.listdir("/dev/shm")) - shared_before
    assert not [name for name in left_behind if set(map(int, re.findall(r"\d+", name))) & set(servers.pids)]


def test_each_frontend_is_restarted_while_the_other_streams(servers: Servers) -> None:
    engine = servers.engine()
    simple, simple_url = servers.frontend("simple")
    openai, openai_url = servers.frontend("openai")
    fields = {"prompt": "hello", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}
    whole = Answer(simple_url, fields).run().last["text"][0]
    for frontend in (simple, openai):
        assert "libtorch" not in Path(f"/proc/{frontend.process.pid}/maps").read_text()

    stream = Answer(simple_url, fields | {"stream": True})
    reading = in_background(stream.run)
    wait_until(lambda: bool(stream.texts), "no token")
    assert openai.process.poll() is None
    openai.stop()
    assert openai.process.returncode == 0
    openai, openai_url = servers.frontend("openai")
    reading.join(DEADLINE_S)
    assert stream.last["text"][0] == whole

    stream = Answer(openai_url, fields | {"stream": True, "n": 2}, "/v1/completions")
    reading = in_background(stream.run)
    wait_until(lambda: not is_idle(openai_url), "nothing runs")
    simple.stop()
    assert simple.process.returncode == 0
    simple, simple_url = servers.frontend("simple")
    assert Answer(simple_url, fields).run().last["text"][0] == whole
    reading.join(DEADLINE_S)
    assert stream.status == 200
    events = [json.loads(e.removeprefix("data: ")) for e in "".join(stream.texts).split("\n\n") if e.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == 1]
    assert "hello" + "".join(choice["text"] for choice in choices) == whole
    for program in (simple, openai, engine):
        program.stop()
        assert program.process.returncode == 0


LONG = {"prompt": "hello", "max_tokens": 3000, "ignore_eos": True, "temperature": 0, "stream": True, "n": 2}
"""Takes two seconds and more."""


@pytest.mark.parametrize("who", ["frontend", "engine"])
def test_sigterm_refuses_what_is_new_and_finishes_what_runs(servers: Servers, who: str) -> None:
    engine = servers.engine("--drain-timeout", "1000")
    frontend, url = servers.frontend("simple", "--drain-timeout", "1000")
    stream = Answer(url, LONG)
    reading = in_background(stream.run)
    wait_until(lambda: bool(stream.texts), "no token")
    ending = frontend if who == "frontend" else engine
    ending.process.send_signal(signal.SIGTERM)
    wait_until(lambda: get(url, "/health/ready")[0] == 503, "it does not say that it ends")
    assert not stream.is_over
    refused = Answer(url, LONG).run()
    assert (refused.status, int(refused.headers["retry-after"]) >= 1) == (503, True)
    assert "takes nothing new" in refused.texts[0]
    assert get(url, "/health")[0] == 200
    reading.join(DEADLINE_S)
    assert "error" not in stream.last
    assert ending.process.wait(DEADLINE_S) == 0, ending.log.read_text()


def test_a_second_signal_ends_at_once(servers: Servers) -> None:
    servers.engine()
    frontend, url = servers.frontend("simple", "--drain-timeout", "1000")
    stream = Answer(url, LONG)
    reading = in_background(stream.run)
    wait_until(lambda: bool(stream.texts), "no token")
    frontend.process.send_signal(signal.SIGTERM)
    wait_until(lambda: get(url, "/health/ready")[0] == 503, "it does not say that it ends")
    assert not stream.is_over
    frontend.process.send_signal(signal.SIGTERM)
    assert frontend.process.wait(DEADLINE_S) == 0, frontend.log.read_text()
    reading.join(DEADLINE_S)
    assert "error" in stream.last


def test_a_second_signal_ends_an_engine_at_once_and_its_streams_go_on_in_the_next(servers: Servers) -> None:
    engine = servers.engine("--drain-timeout", "1000")
    _, url = servers.frontend()
    whole = Answer(url, LONG).run().last
    stream = Answer(url, LONG)
    reading = in_background(stream.run)
    wait_until(lambda: bool(stream.texts), "no token")
    engine.process.send_signal(signal.SIGTERM)
    wait_until(lambda: get(url, "/health/ready")[0] == 503, "it does not say that it ends")
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(DEADLINE_S) == 0, engine.log.read_text()
    assert not stream.is_over
    servers.engine()
    reading.join(DEADLINE_S)
    assert stream.last == whole


def test_an_engine_and_a_frontend_with_its_key_talk_over_tcp(servers: Servers, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        servers.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    key = str(tmp_path / "engine.key")
    engine = servers.engine("--engine-key", key)
    engine.wait_for("Serving ")
    frontend, url = servers.frontend("simple", "--engine-key", key)
    answer = Answer(url, {"prompt": "hello", "max_tokens": 3}).run()
    assert answer.status == 200
    for program in (frontend, engine):
        program.stop()
        assert program.process.returncode == 0, program.log.read_text()


def test_at_four_times_the_capacity_each_request_is_answered_and_health_is_too(servers: Servers) -> None:
    servers.engine("--max-num-seqs", "8", "--max-waiting-requests", "16")
    _, url = servers.frontend()
    fields = {"prompt": "hello", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    health: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            health.append(get(url, "/health")[0])

    watching = in_background(watch)
    with ThreadPoolExecutor(96) as pool:
        answers = list(pool.map(lambda _: Answer(url, fields).run(), range(200)))
    is_over.set()
    watching.join(DEADLINE_S)
    assert {answer.status for answer in answers} <= {200, 503}
    # The waiting room's 16 at least; so many as 24 where the engine begins to work before they have all come.
    assert sum(answer.status == 200 for answer in answers) >= 16
    assert all(1 <= int(a.headers["retry-after"]) <= 60 for a in answers if a.status == 503)
    assert set(health) == {200}
    wait_until(lambda: is_idle(url), "blocks stay in use")
