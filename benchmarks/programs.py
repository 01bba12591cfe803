"""A program that is measured, with all that it starts: begun, held while others run, weighed, ended.

It knows processes as Linux shows them under /proc, nothing of what they compute.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen


class Program:
    """A process and its descendants; some servers put their engines in sessions of their own, so a group is not enough.

    Args:
        command: What is run.
        variables: Added to the environment.
        options: Of `subprocess.Popen`.
    """

    def __init__(self, command: list[str], variables: dict[str, str], **options: Any) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(command, env={**os.environ, **variables}, text=True, **options)

    def tree(self) -> list[int]:
        """Itself and all that it started and that is still there, parents first."""
        children: dict[int, list[int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
        members = [self.process.pid]
        for member in members:
            members += children.get(member, [])
        return members

    def hold(self) -> None:
        """None of its threads runs until `resume`: any other work on the cores makes OpenMP programs collapse."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def resident_mb(self) -> float:
        """Proportional size of all its processes: pages that several share count once."""
        total = 0
        for member in self.tree():
            with suppress(OSError):
                sizes = re.findall(r"^Pss: +(\d+) kB", Path(f"/proc/{member}/smaps_rollup").read_text(), re.MULTILINE)
                total += int(sizes[0])
        return total / 1000

    def end(self) -> None:
        """At once, whatever it does."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def wait_until_it_answers(self, url: str, deadline_s: float) -> float:
        """Returns the seconds until `url` is answered with 200.

        Raises:
            EOFError: It ended before that, or was not ready in time.
        """
        started_s = time.perf_counter()
        while True:
            with suppress(URLError, OSError), urlopen(url, timeout=5):
                return time.perf_counter() - started_s
            elapsed_s = time.perf_counter() - started_s
            if self.process.poll() is not None or elapsed_s > deadline_s:
                raise EOFError(f"it was not ready after {elapsed_s:.0f} s")
            time.sleep(0.01)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            for member in self.tree():
                with suppress(ProcessLookupError):
                    os.kill(member, number)


def free_port() -> int:
    """Of this machine, that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
