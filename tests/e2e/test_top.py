"""`cacheflow top` on a real server: one frame for scripts, and the live view in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import DEADLINE_S, Program

API_KEY = "a-key-for-tests"
ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, long_llama: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("top")
    arguments = ("serve", "simple", "--model", str(long_llama), "--port", "0", "--kv-cache-memory", "0.02")
    program = Program(folder / "log", folder, *arguments, CACHEFLOW_API_KEY=API_KEY)
    try:
        yield "http://" + program.wait_for(" at http://")
    finally:
        program.stop()


class Terminal:
    """A terminal in which `cacheflow top` runs."""

    def __init__(self, *arguments: str, rows: int = 30, columns: int = 100) -> None:
        self.output = b""
        self._own, other = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(other)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cacheflow", "top", *arguments],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", "CACHEFLOW_API_KEY": API_KEY},
        )  # fmt: skip
        self._other = other

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._own, keys)

    def read_until(self, found: bytes) -> None:
        """Reads what is shown until something is in it, and forgets what came before its end."""
        deadline = time.monotonic() + DEADLINE_S
        while found not in self.output:
            assert time.monotonic() < deadline, self.output
            if select.select([self._own], [], [], 0.1)[0]:
                self.output += os.read(self._own, 65536)
        self.output = self.output[self.output.index(found) + len(found) :]

    def read_until_match(self, pattern: bytes) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while re.search(pattern, self.output) is None:
            assert time.monotonic() < deadline, self.output
            if select.select([self._own], [], [], 0.1)[0]:
                self.output += os.read(self._own, 65536)

    def end(self) -> int:
        """The exit code; the terminal must be as it was."""
        self.read_until(LEAVE_SCREEN)
        code = self.process.wait(DEADLINE_S)
        assert termios.tcgetattr(self._other) == self.before
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._own)
        os.close(self._other)


def run(*arguments: str, key: str = API_KEY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cacheflow", "top", "--once", *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S, env={**os.environ, "CACHEFLOW_API_KEY": key, "COLUMNS": "160"},
    )  # fmt: skip


def test_once_prints_a_frame_for_scripts(url: str) -> None:
    done = run(url)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    free, blocks = re.search(r"free ([\d,]+).* ([\d,]+) blocks", done.stdout).groups()  # type: ignore[union-attr]
    assert free == blocks
    assert done.stdout.count(".") >= int(blocks.replace(",", ""))
    assert "No requests." in done.stdout


def test_a_wrong_key_and_a_missing_server_are_a_sentence(url: str) -> None:
    for arguments, key, sentence in (((url,), "wrong", "needs an API key"), (("127.0.0.1:9",), "", "No server answers at")):
        done = run(*arguments, key=key)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
    assert run("ftp://localhost").returncode == 2


def test_no_torch_is_loaded(url: str) -> None:
    code = (
        "import sys\nfrom cacheflow.cli import main\n"
        f"try:\n    main(['top', '--once', {url!r}])\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S,
        env={**os.environ, "CACHEFLOW_API_KEY": API_KEY},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "False\n")


@pytest.mark.parametrize("end", [b"q", b"\x03", None], ids=["q", "ctrl-c", "sigterm"])
def test_it_ends_on_q_and_ctrl_c_and_leaves_the_terminal_as_it_was(url: str, end: bytes | None) -> None:
    terminal = Terminal(url, "--interval", "0.1")
    try:
        terminal.read_until(ENTER_SCREEN)
        terminal.read_until(b"press q to end")
        if end is None:
            terminal.process.send_signal(signal.SIGTERM)
        else:
            terminal.press(end)
        assert terminal.end() == 0
    finally:
        terminal.close()


def test_requests_come_and_go_and_a_new_size_is_filled(url: str) -> None:
    terminal = Terminal(url, "--interval", "0.1")
    body = '{"prompt": "Hello", "max_tokens": 30000, "ignore_eos": true, "stream": true}'
    command = ["curl", "-sN", f"{url}/generate", "-H", f"Authorization: Bearer {API_KEY}", "-d", body]
    try:
        terminal.read_until(b"No requests.")
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as other:
            terminal.read_until(b"Prompt")
            other.kill()
        terminal.read_until(b"No requests.")
        terminal.resize(40, 60)
        # The first row of the map is as wide as the terminal is now.
        terminal.read_until_match(rb"(?:^|\n)(?:[^\n\xe2]*\xe2\x96\x80){60}[^\n\xe2]*\r?\n")
        terminal.press(b"q")
        assert terminal.end() == 0
    finally:
        terminal.close()
