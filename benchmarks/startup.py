"""Start-up and weight: seconds to import, to the first token and to a ready server; resident memory; what is installed.

    python benchmarks/startup.py                                  # this environment
    python benchmarks/startup.py --rounds 5 --output benchmarks/results/startup.jsonl

"Cold" means a new process each time; the system's file cache is as it is. Memory is the resident size of all processes of a
server that answered one request, with 256 MiB of KV cache. Distributions are those that cacheflow-engine and cacheflow-openai
need, themselves included, found by their declared requirements in this environment: pins for development don't count.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from record import surroundings, write

IMPORT = "import time; s = time.perf_counter(); import cacheflow; print(time.perf_counter() - s)"
FIRST_TOKEN = """
import time; s = time.perf_counter()
from cacheflow import LLM, SamplingParams
llm = LLM("demo", kv_cache_memory=0.25)
llm.generate(["Hello"], SamplingParams(max_tokens=1), use_tqdm=False)
print(time.perf_counter() - s)
"""
DEADLINE_S = 120.0


def seconds_of(script: str) -> float:
    """What a script in a new process prints last."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def serve() -> tuple[float, float]:
    """Seconds from the command to the first answer of `GET /v1/models` and MB of all its processes after one completion.

    Raises:
        SystemExit: It did not get ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "openai", "--model", "demo", "--kv-cache-memory", "0.25", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/v1"
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cacheflow", *command],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while True:
            try:
                with urlopen(f"{url}/models", timeout=5) as answer:
                    model = json.load(answer)["data"][0]["id"]
                break
            except (URLError, OSError, KeyError, IndexError):
                if process.poll() is not None or time.perf_counter() - started_s > DEADLINE_S:
                    raise SystemExit(f"The server was not ready after {time.perf_counter() - started_s:.0f} s.") from None
                time.sleep(0.01)
        ready_s = time.perf_counter() - started_s
        body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 8}).encode()
        with urlopen(Request(f"{url}/completions", body, {"Content-Type": "application/json"}), timeout=60) as answer:
            answer.read()
        return ready_s, resident_mb(process.pid)
    finally:
        # A polite end first: it then ends its engine, which is in a session of its own.
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def resident_mb(root: int) -> float:
    """Proportional size of a process and all that it started: pages that several share count once."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    total, members = 0, [root]
    while members:
        member = members.pop()
        members += [child for child, parent in parents.items() if parent == member]
        with suppress(OSError):
            sizes = re.findall(r"^Pss: +(\d+) kB", Path(f"/proc/{member}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(sizes[0])
    return total / 1000


def installed(names: list[str]) -> tuple[int, float]:
    """Distributions that these need, themselves included, and MB of their files."""
    seen: dict[str, float] = {}
    wanted = list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # Its marker is for another system.
        files = [path.locate() for path in found.files or ()]
        seen[name] = sum(Path(str(path)).stat().st_size for path in files if Path(str(path)).is_file()) / 1e6
        wanted += [re.split(r"[\s<>=!~;\[(]", r)[0] for r in found.requires or () if "extra ==" not in r]
    return len(seen), sum(seen.values())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="new processes for each figure (default: 3)")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    runs: dict[str, list[float]] = {"import, s": [], "first token, s": [], "start to ready, s": [], "serving processes, MB": []}
    for _ in range(arguments.rounds):
        ready_s, mb = serve()
        for values, value in zip(runs.values(), (seconds_of(IMPORT), seconds_of(FIRST_TOKEN), ready_s, mb), strict=True):
            values.append(value)
    count, size_mb = installed(["cacheflow-engine", "cacheflow-kernels", "cacheflow-openai"])
    print("| what | median | range (runs) |\n| --- | --- | --- |")
    for name, values in runs.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} ({len(values)}) |")
    print(f"| distributions | {count} | |\n| their files, MB | {size_mb:.0f} | |")
    medians = {name: round(statistics.median(values), 3) for name, values in runs.items()}
    line = {"benchmark": "startup", **medians, "num_distributions": count, "install_mb": round(size_mb), "runs": runs}
    write(arguments.output, line | surroundings())


if __name__ == "__main__":
    main()
