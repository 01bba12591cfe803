"""cacheflow and its peers on the same workloads, on this machine: one table, with the ratio to each peer and to the roofline.

    hatch run compare                                     # W1 to W7, three rounds; about 45 minutes with all peers
    hatch run compare --workload w2 --rounds 5 --output benchmarks/results/peers.jsonl
    hatch run compare --short --system cacheflow          # seconds: eight requests of W1, one round; W7 with as many

Each system is a process of its own environment (`hatch env create peers-vllm`, `peers-llama-cpp`, `peers-transformers`), or of
the interpreter that `--python NAME=PATH` names; one that is not there is "not measured". All that compute with one model are
loaded first. Then rounds interleave them: the others are held (SIGSTOP) while one runs, since any other work makes OpenMP
collapse. The order turns from round to round. A system that takes more than 20 s for a workload runs it once. W7 is
requests over HTTP as they arrive, at two rates and with a seed a round. The machine's limits are measured in the same run.

A file of `--output` is one run: if it was cut short, the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_serving import RATES, measurements
from model_files import write_demo, write_random
from peers.environments import parse_pythons, python_of
from programs import Program
from record import FOLDER, shortened, surroundings, workload, write
from roofline import LLAMA_1B, SMOLLM2_135M, Limits, bound_s, measure_limits
from tables import Line, rate, read, table

ROOT = FOLDER.parent
ALL = ("w1", "w2", "w3", "w4", "w5", "w6", "w7")
SERVED = ("cacheflow", "vllm")
"""Those whose servers batch what arrives together; W7 is theirs."""
SLOW_S = 20.0
"""A system that took longer for a workload has no further rounds of it."""


@dataclass(frozen=True)
class Peer:
    """A system to measure.

    Attributes:
        module: Its program.
        arguments: Of the program, behind the model folder.
        workloads: Those that it runs, W7 apart.
        num_requests: The most requests of a workload that it is given: rates are per token. None: all.
        vendor: Of the processors that it is for, as /proc/cpuinfo has it. None: any.
    """

    module: str
    arguments: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ALL[:-1]
    num_requests: int | None = None
    vendor: str | None = None


PEERS = {
    "cacheflow": Peer("peers.ours"),
    "cacheflow-int8": Peer("peers.ours", ("int8",), ("w2",)),
    "cacheflow-int4": Peer("peers.ours", ("int4",), ("w2",)),
    "cacheflow-int8-dynamic": Peer("peers.ours", ("int8-dynamic",), ("w1", "w3")),
    "vllm": Peer("peers.vllm_cpu"),
    "vllm-zentorch": Peer("peers.vllm_cpu", vendor="AuthenticAMD"),
    "llama-cpp": Peer("peers.llama_cpp"),
    "llama-cpp-q4": Peer("peers.llama_cpp", ("q4_0",), ("w2",)),
    "transformers": Peer("peers.hugging_face", (), ("w1", "w2", "w3", "w4", "w5"), num_requests=16),
    "transformers-continuous": Peer("peers.hugging_face", ("continuous",), ("w1",), num_requests=16),
}


class System:
    """A running process that answers for one system, held but for its runs.

    Raises:
        EOFError: It ended before it had loaded.
    """

    def __init__(self, name: str, python: Path, folder: Path) -> None:
        self.name = name
        command = [str(python), "-m", PEERS[name].module, str(folder), *PEERS[name].arguments]
        self.program = Program(command, {}, cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self.about = self._answer()
        except EOFError:
            self.program.end()
            raise
        self.program.hold()

    def run(self, name: str, is_short: bool) -> dict[str, Any]:
        """One workload, while it alone runs."""
        self.program.resume()
        try:
            pipe = self.program.process.stdin
            assert pipe is not None
            asked = {"workload": name, "is_short": is_short, "num_requests": PEERS[self.name].num_requests}
            pipe.write(json.dumps(asked) + "\n")
            pipe.flush()
            return self._answer()
        finally:
            self.program.hold()

    def _answer(self) -> dict[str, Any]:
        pipe = self.program.process.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise EOFError(f"{self.name} ended without an answer; its messages stand above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Comparison:
    """What is asked for, and what was measured of it so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._is_short: bool = arguments.short
        self._rounds = 1 if self._is_short else arguments.rounds
        self._output: Path | None = arguments.output
        self._given = parse_pythons(arguments.python)
        self.wanted: list[str] = arguments.system or list(PEERS)
        self._facts = surroundings()
        self.lines = read(arguments.output) if arguments.output else []
        self.lines = [line for line in self.lines if line["is_short"] == self._is_short]
        if strange := {line["commit"] for line in self.lines} - {self._facts["commit"]}:
            raise SystemExit(
                f"{arguments.output} is a run of {', '.join(map(str, strange))}, and this is {self._facts['commit']}: "
                "figures compare only within one run. Name another file with --output."
            )
        self._limits = Limits(**self.lines[0]["limits"]) if self.lines else measure_limits()
        print(
            f"Limits of the machine: {self._limits.vector_gflops:.0f} GFLOP/s with vectors, "
            f"{self._limits.matrix_gflops:.0f} with AMX, reading {self._limits.read_gb_s:.1f} GB/s.",
            flush=True,
        )

    def run(self, names: list[str], folder: Path) -> None:
        """Workloads of one model, with all systems that have any left to do."""
        wanted = [name for name in self.wanted if any(self._is_left(workload_name, name) for workload_name in names)]
        systems = list(self._started(wanted, folder))
        try:
            for name in names:
                for round_number in range(self._rounds):
                    turn = round_number % max(1, len(systems))
                    for system in systems[turn:] + systems[:turn]:
                        if self._is_left(name, system.name, round_number):
                            self._measure(system, name, round_number)
        finally:
            for system in systems:
                system.program.end()

    def run_serving(self, folder: Path) -> None:
        """W7, with a seed for each round."""
        rates = [50.0] if self._is_short else RATES
        done = {(line["rate"], line["seed"]) for line in self.lines if line["workload"] == "w7"}
        runs = [(rate, seed) for rate in rates for seed in range(self._rounds) if (rate, seed) not in done]
        pythons = {name: python_of(name, self._given) for name in self.wanted if name in SERVED}
        there = {name: python for name, python in pythons.items() if python.exists()}
        for name, figures in measurements(there, folder, runs, self._is_short) if runs else ():
            self._keep({"workload": "w7", "system": name, "round": figures["seed"], **figures})
            ttft, itl = figures["ttft_s"], figures["itl_s"]
            print(
                f"w7 {name} at {figures['rate']:g}/s, seed {figures['seed']}: TTFT {1000 * ttft['p50']:.1f} and "
                f"{1000 * ttft['p99']:.1f} ms, ITL {1000 * itl['p50']:.1f} and {1000 * itl['p99']:.1f} ms (p50 and p99)",
                flush=True,
            )

    def _is_left(self, name: str, system: str, round_number: int | None = None) -> bool:
        if name not in PEERS[system].workloads:
            return False
        done = [line for line in self.lines if (line["workload"], line["system"]) == (name, system)]
        if any(line["elapsed_s"] > SLOW_S for line in done):
            return False
        rounds = range(self._rounds) if round_number is None else [round_number]
        return bool(set(rounds) - {line["round"] for line in done})

    def _started(self, names: list[str], folder: Path) -> Iterator[System]:
        """Those that can be started; of the others a line says why not."""
        for name in names:
            python, vendor = python_of(name, self._given), PEERS[name].vendor
            if vendor and vendor not in Path("/proc/cpuinfo").read_text():
                print(f"{name}: not measured, it is for processors of {vendor}", flush=True)
            elif not python.exists():
                print(f"{name}: not measured, there is no {python} (hatch env create {python.parents[1].name})", flush=True)
            else:
                try:
                    yield System(name, python, folder)
                except EOFError as error:
                    print(f"{name}: not measured, {error}", flush=True)

    def _measure(self, system: System, name: str, round_number: int) -> None:
        answer = system.run(name, self._is_short)
        items = (shortened(workload(name)) if self._is_short else workload(name))[: PEERS[system.name].num_requests]
        least_s = bound_s(items, 4 if name == "w5" else 1, LLAMA_1B if name == "w6" else SMOLLM2_135M, self._limits)
        line = {"workload": name, "system": system.name, "round": round_number, "num_requests": len(items), **answer}
        line |= {"roofline_s": round(least_s, 4), "load_s": system.about["load_s"], "system_versions": system.about["versions"]}
        self._keep(line)
        print(f"{name} {system.name}: {answer['elapsed_s']:.2f} s, {rate(line):.1f} tokens/s", flush=True)

    def _keep(self, line: Line) -> None:
        whole = {"benchmark": "peers", "is_short": self._is_short, **line, "limits": vars(self._limits), **self._facts}
        self.lines.append(whole)
        write(self._output, whole)


def main() -> None:
    """Measures what is asked for, model by model, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=ALL, help="may be repeated; default: all")
    parser.add_argument("--system", action="append", choices=list(PEERS), help="may be repeated; default: all that are there")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system on each workload (default: 3)")
    parser.add_argument("--short", action="store_true", help="eight requests of W1 and of W7, short outputs, one round")
    parser.add_argument(
        "--models",
        type=Path,
        default=ROOT / ".venvs" / "peer-models",
        help="where their models are written: 0.5 GB, for W6 5 GB",
    )
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="another interpreter of a system")
    parser.add_argument("--output", type=Path, help="a file of JSON lines, which is one run: what stands there is not repeated")
    arguments = parser.parse_args()
    names = arguments.workload or (["w1", "w7"] if arguments.short else list(ALL))
    folder: Path = arguments.models.resolve()
    comparison = Comparison(arguments)
    if set(names) != {"w6"}:
        write_demo(folder / "demo", with_gguf=any(name.startswith("llama-cpp") for name in comparison.wanted))
        comparison.run([name for name in names if name not in ("w6", "w7")], folder / "demo")
    if "w6" in names:
        write_random(folder / "llama-1b")
        comparison.run(["w6"], folder / "llama-1b")
    if "w7" in names:
        comparison.run_serving(folder / "demo")
    print("\n" + table(comparison.lines))


if __name__ == "__main__":
    main()
