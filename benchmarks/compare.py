"""cacheflow and its peers on the same workloads, on this machine: one table, with the ratio to each peer and to the roofline.

    hatch run compare                                     # W1 to W5, three rounds; about 40 minutes
    hatch run compare --workload w2 --rounds 5 --output benchmarks/results/peers.jsonl
    hatch run compare --short                             # eight requests of W1, one round

Each system is a process of its own environment (`hatch env create peers-vllm`, `peers-llama-cpp`, `peers-transformers`), or of
the interpreter that `--python NAME=PATH` names; one that is not there is "not measured". All are loaded first. Then rounds
interleave them: the others are stopped (SIGSTOP) while one runs, since any other work makes OpenMP collapse. The order turns
from round to round. The machine's limits are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import FOLDER, shortened, surroundings, workload, write
from roofline import SMOLLM2_135M, Limits, bound_s, measure_limits

ROOT = FOLDER.parent
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cacheflow": ("peers.ours", ()),
    "cacheflow-int8": ("peers.ours", ("int8",)),
    "cacheflow-int4": ("peers.ours", ("int4",)),
    "vllm": ("peers.vllm_cpu", ()),
    "llama-cpp": ("peers.llama_cpp", ()),
    "transformers": ("peers.hugging_face", ()),
    "transformers-continuous": ("peers.hugging_face", ("continuous",)),
}
"""The program of each system, and its arguments behind the model folder."""
DEFAULT = ("cacheflow", "vllm", "llama-cpp", "transformers")
COUNTS = {"w3": "num_prompt_tokens"}
"""What a workload's rate counts, where that is not output tokens."""


@dataclass
class System:
    """A running process that answers for one system."""

    name: str
    process: subprocess.Popen[str]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, python: Path, folder: Path) -> System:
        """Starts it and waits until it has loaded.

        Raises:
            EOFError: It ended before that.
        """
        module, arguments = PEERS[name]
        command = [str(python), "-m", module, str(folder), *arguments]
        # In a session of its own, so that it is stopped and ended with all that it starts.
        process = subprocess.Popen(
            command, cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        system = cls(name, process)
        try:
            system.about = system._answer()
        except EOFError:
            system.end()
            raise
        system.signal(signal.SIGSTOP)
        return system

    def run(self, name: str, is_short: bool) -> dict[str, Any]:
        """One workload, while it alone runs."""
        self.signal(signal.SIGCONT)
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"workload": name, "is_short": is_short}) + "\n")
            self.process.stdin.flush()
            return self._answer()
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """To it and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Without waiting for what it does."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"{self.name} ended without an answer; its messages stand above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def python_of(name: str, given: dict[str, Path]) -> Path:
    """The interpreter of a system's environment."""
    base = name.removesuffix("-continuous")
    if base in given:
        return given[base]
    return Path(sys.executable) if base.startswith("cacheflow") else ROOT / ".venvs" / f"peers-{base}" / "bin" / "python"


def start_all(names: list[str], given: dict[str, Path], folder: Path) -> list[System]:
    """Those that can be started; of the others a line says why not."""
    systems = []
    for name in names:
        python = python_of(name, given)
        if not python.exists():
            print(f"{name}: not measured, there is no {python} (hatch env create peers-{name})", flush=True)
            continue
        try:
            systems.append(System.start(name, python, folder))
        except EOFError as error:
            print(f"{name}: not measured, {error}", flush=True)
    return systems


def table(rates: dict[tuple[str, str], list[float]], bounds: dict[str, float], limits: Limits) -> str:
    """Medians and ranges, how many times as fast cacheflow is, and the share of the roofline that each reaches."""
    lines = [
        f"Limits measured in this run: {limits.vector_gflops:.0f} GFLOP/s with vectors, {limits.matrix_gflops:.0f} with AMX, "
        f"reading {limits.read_gb_s:.1f} GB/s.",
        "",
        "| workload | system | tokens/s | range (runs) | cacheflow is faster by | of the roofline |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (name, system), runs in rates.items():
        middle = statistics.median(runs)
        ours = rates.get((name, "cacheflow"))
        ratio = f"{statistics.median(ours) / middle:.2f}x" if ours and system != "cacheflow" else ""
        spread = f"{min(runs):.1f} to {max(runs):.1f} ({len(runs)})"
        unit = "prompt" if name in COUNTS else "output"
        lines.append(
            f"| {name.upper()} ({unit}) | {system} | {middle:.1f} | {spread} | {ratio} | {middle / bounds[name]:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Starts the systems, runs the rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workload", action="append", choices=("w1", "w2", "w3", "w4", "w5"), help="may be repeated; default: all"
    )
    parser.add_argument(
        "--system", action="append", choices=list(PEERS), help=f"may be repeated; default: {', '.join(DEFAULT)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system on each workload (default: 3)")
    parser.add_argument("--short", action="store_true", help="eight requests of W1, short outputs, one round")
    parser.add_argument(
        "--models", type=Path, default=ROOT / ".venvs" / "peer-models", help="where the model is written for them"
    )
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="another interpreter of a system")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    names = ["w1"] if arguments.short else arguments.workload or ["w1", "w2", "w3", "w4", "w5"]
    rounds = 1 if arguments.short else arguments.rounds
    given = {name: Path(path) for name, _, path in (entry.partition("=") for entry in arguments.python)}

    subprocess.run([sys.executable, str(FOLDER / "model_files.py"), str(arguments.models)], check=True)
    limits, facts = measure_limits(), surroundings()
    systems = start_all(arguments.system or list(DEFAULT), given, arguments.models.resolve())
    rates: dict[tuple[str, str], list[float]] = {}
    bounds: dict[str, float] = {}
    try:
        for round_number in range(rounds):
            for name in names:
                items = shortened(workload(name)) if arguments.short else workload(name)
                least_s = bound_s(items, 4 if name == "w5" else 1, SMOLLM2_135M, limits)
                turn = round_number % max(1, len(systems))
                for system in systems[turn:] + systems[:turn]:
                    answer = system.run(name, arguments.short)
                    count = answer[COUNTS.get(name, "num_output_tokens")]
                    rates.setdefault((name, system.name), []).append(count / answer["elapsed_s"])
                    bounds[name] = count / least_s
                    print(
                        f"{name} {system.name}: {answer['elapsed_s']:.2f} s, {count / answer['elapsed_s']:.1f} tokens/s",
                        flush=True,
                    )
                    write(
                        arguments.output,
                        {
                            "benchmark": "peers",
                            "workload": name,
                            "is_short": arguments.short,
                            "system": system.name,
                            "round": round_number,
                            **answer,
                            "roofline_s": round(least_s, 4),
                            "limits": vars(limits),
                            "load_s": system.about["load_s"],
                            "system_versions": system.about["versions"],
                            **facts,
                        },
                    )
    finally:
        for system in systems:
            system.end()
    in_order = {key: rates[key] for name in names for key in [(name, s.name) for s in systems] if key in rates}
    print("\n" + table(in_order, bounds, limits))


if __name__ == "__main__":
    main()
