"""The packed CPU linear beside the machine's limits and torch: time, GFLOP/s and GB/s of weights, and ratios.

The limits are `probe_linear.cpp`, compiled for this machine and run in turn with the rest, and plain reading of memory. Weights
rotate through as many copies as it takes to be larger than `--cold-mb`, so that they come from memory as in a model; the
probe's and torch's too. Figures compare only within one run; run it alone on the machine.

    python benchmarks/bench_linear.py                       # all shapes, about three minutes
    python benchmarks/bench_linear.py --shape head --rows 1 8 --form plain int8 --cold-mb 0
    python benchmarks/bench_linear.py --output benchmarks/results/linear.jsonl
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from record import FOLDER, surroundings, write

from cacheflow_kernels import linear
from cacheflow_kernels.cpu import library

SHAPES = {
    "qkv": (576, 960),
    "gate_up": (576, 3072),
    "down": (1536, 576),
    "head": (576, 49152),
    "1b_qkv": (2048, 3072),
    "1b_gate_up": (2048, 16384),
    "huge": (576, 480_000),
}
"""in_features, out_features: SmolLM2-135M's, Llama-3.2-1B's, and one that no cache holds."""
FORMS = ("plain", "bias", "gated", "bias+gated", "int8", "int4", "int8_dynamic")
"""What ours is measured as; "bias" and "gated" are plain weights with what may be fused."""
GROUP = 32
"""Inputs that share a scale, as in the engine."""
BYTES = {"int8": 1 + 2 / GROUP, "int4": 0.5 + 4 / GROUP, "int8_dynamic": 1.0}
"""Of one weight, with its share of a float16 scale and minimum; bfloat16 otherwise."""
Call = Callable[[], object]


class Probe:
    """The compiled probe."""

    def __init__(self, folder: Path) -> None:
        path = folder / "probe_linear.so"
        command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-o", str(path)]
        subprocess.run([*command, str(FOLDER / "probe_linear.cpp")], check=True)
        self._library = ctypes.CDLL(str(path))
        self._library.probe_read.restype = ctypes.c_int64

    def linear(self, x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor) -> None:
        """float32 `out` = x times a packed weight."""
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, packed, out)]
        sizes = [ctypes.c_int64(size) for size in (*x.shape, out.shape[1])]
        self._library.probe_linear(pointers[0], pointers[1], *sizes, pointers[2])

    def read_gb_s(self, num_bytes: int = 1 << 29) -> float:
        """Read bandwidth of all cores: the best of five passes over memory that no cache holds."""
        memory = torch.ones(num_bytes, dtype=torch.uint8)
        pointer, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(num_bytes)
        return num_bytes / min(elapsed_s(lambda: self._library.probe_read(pointer, size)) for _ in range(5)) / 1e9


def elapsed_s(call: Call, times: int = 1) -> float:
    """Of one call, the mean of `times`."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def rotating(functions: Sequence[Call]) -> Call:
    """Calls one after the other, so that each finds its weights as the others left the caches."""
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def candidates(shape: tuple[int, int], rows: int, forms: Sequence[str], cold_bytes: int, probe: Probe) -> dict[str, Call]:
    """What to time, by name."""
    in_features, out_features = shape
    copies = max(1, -(-cold_bytes // (2 * in_features * out_features)))
    x = torch.randn(rows, in_features).bfloat16()
    weight = (torch.randn(out_features, in_features) / in_features**0.5).bfloat16()
    bias = torch.randn(out_features).bfloat16()
    panels = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()
    out = torch.empty(rows, out_features)

    def in_turn(make: Callable[[], Call]) -> Call:
        return rotating([make() for _ in range(copies)])

    def probing() -> Call:
        own = panels.clone()
        return lambda: probe.linear(x, own, out)

    def with_torch() -> Call:
        own = weight.clone()
        return lambda: torch.nn.functional.linear(x, own)

    def ours(form: str) -> Callable[[], Call]:
        def make() -> Call:
            quantised, offset = form if form in BYTES else "plain", bias if "bias" in form else None
            multiply = linear(weight, offset, form=quantised, group_size=GROUP, is_gated="gated" in form)
            return lambda: multiply(x)

        return make

    return {"probe": in_turn(probing), "torch": in_turn(with_torch)} | {form: in_turn(ours(form)) for form in forms}


def main() -> None:
    """Measures what is asked for and prints a table a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 24, 64, 512], help="default: 1 8 24 64 512")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument(
        "--cold-mb", type=int, default=0, help="least MB of weights in turn; 0: one weight, as in PEERS (default)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the median counts (default: 7)")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    if library.level() not in ("avx512bf16", "amx"):
        raise SystemExit(f"The probe needs AVX512_BF16, and the level here is {library.level()}.")
    facts = surroundings() | {"num_threads": torch.get_num_threads(), "level": library.level()}
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(Path(folder))
        for name in arguments.shape:
            read_gb_s = probe.read_gb_s()
            print(f"\n{name} {SHAPES[name]}, reading memory {read_gb_s:.1f} GB/s")
            print("| rows | what | us | GFLOP/s | GB/s | of probe |")
            for rows in arguments.rows:
                calls = candidates(SHAPES[name], rows, arguments.form, arguments.cold_mb * 10**6, probe)
                times = timed(calls, arguments.repeats)
                report(name, rows, times, read_gb_s, arguments.output, facts)


def timed(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds of a call; the candidates take turns, and each turn lasts some 20 ms."""
    turns = {name: max(1, round(0.02 / min(elapsed_s(call) for _ in range(3)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(elapsed_s(call, turns[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def report(
    shape: str, rows: int, times: dict[str, float], read_gb_s: float, output: Path | None, facts: dict[str, object]
) -> None:
    """Prints and writes the figures of one shape and number of rows."""
    in_features, out_features = SHAPES[shape]
    weights = in_features * out_features
    for name, seconds in times.items():
        figures = {
            "us": round(seconds * 1e6, 2),
            "gflop_s": round(2 * rows * weights / seconds / 1e9, 1),
            "gb_s": round(weights * BYTES.get(name, 2.0) / seconds / 1e9, 2),
            "of_probe": round(times["probe"] / seconds, 3),
        }
        print(f"| {rows} | {name} | " + " | ".join(str(figure) for figure in figures.values()) + " |", flush=True)
        line = {"benchmark": "linear", "shape": shape, "in_features": in_features, "out_features": out_features}
        write(output, line | {"rows": rows, "what": name, **figures, "read_gb_s": round(read_gb_s, 1), **facts})


if __name__ == "__main__":
    main()
