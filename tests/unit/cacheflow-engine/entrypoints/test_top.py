"""How `cacheflow top` reads a server, on servers that are none of ours."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner
from rich.console import Console

from cacheflow.entrypoints.top import ServerError, _Server, _watch, top
from cacheflow.entrypoints.top_frame import History, Reading

Serve = Callable[[int, bytes], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that gives one answer to everything, and returns its address."""
    servers: list[HTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (200, b"hello", "is no server of cacheflow"),
        (200, b"{}", "is no server of cacheflow"),
        (200, b"[]", "is no server of cacheflow"),
        (404, b'{"error": "Not Found"}', "with status 404."),
        (404, b'{"error": {"message": null}}', "with status 404."),
        (500, b"[1]", "with status 500."),
        (503, b'{"error": {"message": "The engine is gone."}}', "with status 503. The engine is gone."),
    ],
)
def test_an_answer_of_another_kind_is_a_sentence(serve: Serve, status: int, body: bytes, sentence: str) -> None:
    with pytest.raises(ServerError, match=sentence):
        _Server(serve(status, body), None).read()


def test_what_a_server_says_can_not_steer_the_terminal(serve: Serve) -> None:
    url = serve(500, b'{"error": {"message": "a\\u001b[2Jb"}}')
    with pytest.raises(ServerError, match=r"a\?\[2Jb"):
        _Server(url, None).read()


def test_of_the_servers_keys_in_the_environment_the_first_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    class Server(_Server):
        def read(self) -> Reading:
            sent.append(self._headers)
            raise ServerError("Enough.")

    monkeypatch.setattr("cacheflow.entrypoints.top._Server", Server)
    monkeypatch.setenv("CACHEFLOW_API_KEY", "one , two")
    for arguments in ([], ["--api-key", "a,b"]):
        CliRunner().invoke(top, arguments)
    CliRunner(env={"CACHEFLOW_API_KEY": ""}).invoke(top)
    assert sent == [{"authorization": "Bearer one"}, {"authorization": "Bearer a,b"}, {}]


def test_a_key_that_no_header_can_carry_is_a_usage_error() -> None:
    assert "printable ASCII" in CliRunner().invoke(top, ["--api-key", "a\nb"]).output


@pytest.fixture
def handlers() -> Iterator[None]:
    """Gives the process its signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("handlers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_dropped_in_a_destructor_ends_it_too(number: int) -> None:
    class Dropping:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0)  # Here Python runs the handler, and drops what it raises.

    class Server(_Server):
        num_reads = 0

        def read(self) -> Reading:
            self.num_reads += 1
            assert self.num_reads == 1, "It goes on."
            Dropping()
            stats = dict.fromkeys(
                (
                    "num_running", "num_waiting", "num_blocks", "num_free_blocks", "num_cached_blocks", "num_preemptions",
                    "num_prompt_tokens", "num_generated_tokens", "num_cached_tokens", "num_steps",
                ),
                0,
            )  # fmt: skip
            latency = {"ttft_s": None, "itl_s": None, "e2e_s": None, "output_tokens_per_s": 0.0}
            return Reading("tiny", stats, latency, [], [], 0.0)

    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    _watch(Server("http://localhost", None), History(), console, "http://localhost", 0.01)
    assert console.file.getvalue().endswith("\x1b[?25h\x1b[?1049l")  # type: ignore[attr-defined]
