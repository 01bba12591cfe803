"""A server with four times the requests it has room for: is each answered, is `/health`, and does memory stay flat?

Starts an engine and the simple frontend with little room (8 sequences run, 242 wait: 250 in all), and sends 1,000 requests at
once; in further rounds they come at four times the rate at which the first round's were served. Meanwhile another process asks
`/health` again and again. Before and after each round it reads both servers' memory. Writes one JSON line with `--out`.

    python benchmarks/overload.py --model demo
    python benchmarks/overload.py --model PATH --num-requests 200 --num-rounds 3

The client takes part of the same cores as the server, so latencies are those of a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from record import surroundings, write

NUM_RUNNING = 8
START_TIMEOUT_S = 60.0
HEALTH_INTERVAL_S = 0.02


async def ask(where: str, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str]]:
    """One request on a connection of its own: the status and the headers of its answer, once all of it has come."""
    host, _, port = where.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: {where}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        lines = (await reader.read()).partition(b"\r\n\r\n")[0].decode().split("\r\n")
    finally:
        writer.close()
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split()[1]), headers


def watch_health(where: str, is_over: Any, latencies_s: Any) -> None:
    """Asks `/health` until it is over. It runs in a process of its own: that of the requests is busy with them."""
    found: list[float] = []
    while not is_over.is_set():
        connection = http.client.HTTPConnection(where, timeout=START_TIMEOUT_S)
        started_s = time.perf_counter()
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        found.append(time.perf_counter() - started_s)
        connection.close()
        assert response.status == 200, f"/health answered {response.status}"
        time.sleep(HEALTH_INTERVAL_S)
    latencies_s.put(found)


async def send(where: str, num_requests: int, num_tokens: int, rate: float) -> tuple[float, list[Any]]:
    """All requests, so many per second: how long it took, and the answer to each, or the exception."""
    fields = {"prompt": "The future of AI is", "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    body = json.dumps(fields).encode()

    async def one(number: int) -> tuple[int, dict[str, str]]:
        await asyncio.sleep(number / rate)
        return await ask(where, "POST", "/generate", body)

    started_s = time.perf_counter()
    answers = await asyncio.gather(*map(one, range(num_requests)), return_exceptions=True)
    return time.perf_counter() - started_s, answers


def overload(where: str, num_requests: int, num_tokens: int, rate: float, pids: dict[str, int]) -> dict[str, Any]:
    """One round."""
    before = {name: resident_mb(pid) for name, pid in pids.items()}
    spawning = multiprocessing.get_context("spawn")
    is_over, found = spawning.Event(), spawning.Queue()
    watch = spawning.Process(target=watch_health, args=(where, is_over, found))
    watch.start()
    time.sleep(1.0)  # Until it asks.
    elapsed_s, answers = asyncio.run(send(where, num_requests, num_tokens, rate))
    is_over.set()
    latencies_s = sorted(found.get(timeout=START_TIMEOUT_S))
    watch.join()
    statuses = Counter(type(a).__name__ if isinstance(a, BaseException) else str(a[0]) for a in answers)
    refused = [a[1].get("retry-after") for a in answers if not isinstance(a, BaseException) and a[0] == 503]
    return {
        "rate": None if math.isinf(rate) else round(rate, 1),
        "elapsed_s": round(elapsed_s, 2),
        "statuses": dict(statuses),
        "retry_after_s": sorted({int(seconds) for seconds in refused if seconds is not None}),
        "num_without_retry_after": refused.count(None),
        "health": {
            "num_asked": len(latencies_s),
            "p50_ms": round(1000 * latencies_s[len(latencies_s) // 2], 1),
            "p99_ms": round(1000 * latencies_s[int(0.99 * len(latencies_s))], 1),
            "max_ms": round(1000 * latencies_s[-1], 1),
        },
        "resident_before_mb": before,
        "resident_mb": {name: resident_mb(pid) for name, pid in pids.items()},
    }


def resident_mb(pid: int) -> float:
    """Memory that a process has in use."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def wait_for_url(log: Path, process: subprocess.Popen[bytes]) -> str:
    """The address that a frontend prints once it serves."""
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s and process.poll() is None:
        _, found, rest = log.read_text().partition(" at http://")
        if found and "\n" in rest:
            return rest.partition("\n")[0].strip()
        time.sleep(0.05)
    raise SystemExit(f"The frontend did not come up:\n{log.read_text()}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--num-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--num-rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    num_waiting = arguments.num_requests // 4 - NUM_RUNNING
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        address, log = f"ipc://{folder}/run/engine.sock", Path(folder, "frontend.log")
        command = [sys.executable, "-m", "cacheflow"]
        limits = ["--max-num-seqs", str(NUM_RUNNING), "--max-waiting-requests", str(num_waiting), "--disable-log-requests"]
        with log.open("w") as file:
            engine = subprocess.Popen(
                [*command, "engine", "--model", arguments.model, "--listen", address, *limits], stdout=file, stderr=file
            )
            frontend = subprocess.Popen(
                [*command, "serve", "simple", "--engine", address, "--port", "0"], stdout=file, stderr=file
            )
        try:
            where = urlsplit("http://" + wait_for_url(log, frontend)).netloc
            pids = {"frontend": frontend.pid, "engine": engine.pid}
            rounds: list[dict[str, Any]] = []
            rate = math.inf
            for _ in range(arguments.num_rounds):
                rounds.append(overload(where, arguments.num_requests, arguments.num_tokens, rate, pids))
                print(json.dumps(rounds[-1]), flush=True)
                if math.isinf(rate):
                    rate = 4 * rounds[0]["statuses"].get("200", 1) / rounds[0]["elapsed_s"]
        finally:
            for process in (frontend, engine):
                process.terminate()
                process.wait()
    measurement = {
        "benchmark": "overload", "model": arguments.model, "num_requests": arguments.num_requests,
        "num_tokens": arguments.num_tokens, "capacity": NUM_RUNNING + num_waiting, "rounds": rounds,
    }  # fmt: skip
    write(arguments.out, measurement | surroundings())


if __name__ == "__main__":
    main()
