"""The `cacheflow` command as a process of its own, for tests that need a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEADLINE_S = 180.0
"""Until what must happen is taken not to happen. What a test judges is never how long something took."""


class Program:
    """`cacheflow` as a process, with its output in a file."""

    def __init__(self, log: Path, hub_cache: Path, *arguments: str, **variables: str) -> None:
        self.log = log
        environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "OMP_NUM_THREADS": "1", **variables}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cacheflow", *arguments], stdout=file, stderr=file, cwd=ROOT, env=environment
            )

    def wait_for(self, text: str) -> str:
        """What follows `text` in its line, once it is printed."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            _, found, rest = self.log.read_text().partition(text)
            if found and "\n" in rest:
                return rest.partition("\n")[0].strip()
            time.sleep(0.02)
        raise AssertionError(f"{text!r} did not come:\n{self.log.read_text()}")

    def wait_for_url(self) -> str:
        """The address that a frontend prints when it is ready."""
        return "http" + self.wait_for(" at http")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(DEADLINE_S)
