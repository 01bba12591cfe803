"""The least time that a workload can take on this machine, from limits that are measured here and now.

    t = max(FLOP / peak, bytes / bandwidth), for the prefill as one phase and for each decode step

FLOP = 2 x body parameters a token + 2 x head parameters a sampled token + 4 x layers x heads x head size x context;
bytes = all bfloat16 weights once a step + the keys and values that are read. A shared prefix is computed once. Every request
decodes from the first step on, one token a step: no schedule takes fewer steps.

    python benchmarks/roofline.py        # the limits, and the bound of each workload
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from record import FOLDER, Item, workload


@dataclass(frozen=True)
class Limits:
    """Of the machine, on all its cores.

    Attributes:
        vector_gflops: bfloat16 products of the vector units (`vdpbf16ps`), 0 where there are none.
        matrix_gflops: Of the matrix units (AMX), 0 where there are none.
        read_gb_s: Reading memory.
    """

    vector_gflops: float
    matrix_gflops: float
    read_gb_s: float

    @property
    def peak_gflops(self) -> float:
        """Of whatever is fastest."""
        return max(self.vector_gflops, self.matrix_gflops)


@dataclass(frozen=True)
class Shape:
    """A model, as far as the bound needs it: parameters, and elements of its KV cache a token."""

    body: int
    head: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def weight_bytes(self) -> int:
        """In bfloat16."""
        return 2 * (self.body + self.head)

    @property
    def kv_bytes(self) -> int:
        """Of a token, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


SMOLLM2_135M = Shape(body=106_200_000, head=28_311_552, layers=30, heads=9, kv_heads=3, head_size=64)
LLAMA_1B = Shape(body=973_000_000, head=262_668_288, layers=16, heads=32, kv_heads=8, head_size=64)


def measure_limits() -> Limits:
    """Compiles the probes for this machine and takes the best of several runs: a second or two.

    Raises:
        SystemExit: There is no g++.
    """
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    with tempfile.TemporaryDirectory() as folder:
        vector = matrix = 0.0
        read = _torch_read_gb_s()
        if "avx512_bf16" in flags:
            probe = _compiled("probe_linear.cpp", Path(folder), "-march=native")
            vector = _vector_gflops(probe)
            read = max(read, _probe_read_gb_s(probe))
        if "amx_bf16" in flags:
            matrix = _matrix_gflops(_amx_probe(Path(folder)))
    return Limits(round(vector, 1), round(matrix, 1), round(read, 2))


def bound_s(items: list[Item], n: int, shape: Shape, limits: Limits) -> float:
    """The least seconds in which `items`, with n outputs each, can be served."""
    peak, bandwidth = limits.peak_gflops * 1e9, limits.read_gb_s * 1e9
    attention = 4 * shape.layers * shape.heads * shape.head_size
    shared = len(os.path.commonprefix([item.prompt_token_ids for item in items])) if len(items) > 1 else 0
    new = [len(item.prompt_token_ids) - (shared if i else 0) for i, item in enumerate(items)]
    flop: float = 2 * shape.body * sum(new) + 2 * shape.head * len(items)
    for item, count in zip(items, new, strict=True):
        length = len(item.prompt_token_ids)
        flop += attention * count * (2 * length - count) / 2
    total = max(flop / peak, shape.weight_bytes / bandwidth)
    for step in range(1, max(item.num_output_tokens for item in items)):
        contexts = [len(item.prompt_token_ids) + step for item in items if item.num_output_tokens > step]
        # Outputs of one prompt share its keys and values, and read them once.
        num_read = sum(context + (n - 1) * step for context in contexts)
        flop = n * len(contexts) * 2 * (shape.body + shape.head) + attention * n * sum(contexts)
        total += max(flop / peak, (shape.weight_bytes + num_read * shape.kv_bytes) / bandwidth)
    return total


def _compiled(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    path = folder / f"{source}.so"
    command = ["g++", "-O3", *flags, "-fopenmp", "-shared", "-fPIC", "-o", str(path), str(FOLDER / source)]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise SystemExit("The machine's limits are measured by compiled probes: install g++.") from None
    return ctypes.CDLL(str(path))


def _amx_probe(folder: Path) -> ctypes.CDLL:
    return _compiled("probe_amx.cpp", folder, "-mamx-tile", "-mamx-bf16", "-march=native")


def _best_s(call: Callable[[], object], runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _vector_gflops(probe: ctypes.CDLL) -> float:
    """On matrices that stay in the caches, with as many rows as keep the units busy."""
    rows, inputs, outputs = 96, 576, 960
    x, weight = torch.ones(rows, inputs).bfloat16(), torch.ones(outputs, inputs).bfloat16()
    out = torch.empty(rows, outputs)
    sizes = [ctypes.c_int64(size) for size in (rows, inputs, outputs)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weight, out)]
    call = partial(probe.probe_linear, pointers[0], pointers[1], *sizes, pointers[2])
    return 2 * rows * inputs * outputs / _best_s(call, 50) / 1e9


def _matrix_gflops(probe: ctypes.CDLL) -> float:
    times = 200_000
    if not probe.probe_amx(ctypes.c_int64(1000)):
        return 0.0
    seconds = _best_s(lambda: probe.probe_amx(ctypes.c_int64(times)))
    return 2 * 32**3 * times * torch.get_num_threads() / seconds / 1e9


def _matrix_gflops_from_second_cache() -> float:
    """What the matrix units reach with the operands of a product in each core's second cache; 0 without such units."""
    with tempfile.TemporaryDirectory() as folder:
        probe = _amx_probe(Path(folder))
        if not probe.probe_amx(ctypes.c_int64(1)):
            return 0.0
        times = 100
        seconds = _best_s(lambda: probe.probe_amx_second_cache(ctypes.c_int64(times)))
    return 2 * 256 * 576 * 16 * 32 * times * torch.get_num_threads() / seconds / 1e9


def _probe_read_gb_s(probe: ctypes.CDLL, num_bytes: int = 1 << 29) -> float:
    memory = torch.ones(num_bytes, dtype=torch.uint8)
    probe.probe_read.restype = ctypes.c_int64
    return num_bytes / _best_s(lambda: probe.probe_read(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(num_bytes))) / 1e9


def _torch_read_gb_s(num_bytes: int = 1 << 29) -> float:
    memory = torch.ones(num_bytes // 8, dtype=torch.int64)
    return num_bytes / _best_s(memory.sum) / 1e9


def main() -> None:
    """Prints the limits and the bounds."""
    limits = measure_limits()
    print(f"{limits.vector_gflops} GFLOP/s with vectors, {limits.matrix_gflops} with AMX; reading {limits.read_gb_s} GB/s")
    if limits.matrix_gflops:
        print(f"{_matrix_gflops_from_second_cache():.1f} GFLOP/s with AMX where the operands lie in the second cache")
    for name in ("w1", "w2", "w3", "w4", "w5", "w6"):
        shape, n = (LLAMA_1B if name == "w6" else SMOLLM2_135M), (4 if name == "w5" else 1)
        items = workload(name)
        seconds, num_output = bound_s(items, n, shape, limits), n * sum(item.num_output_tokens for item in items)
        num_prompt = sum(len(item.prompt_token_ids) for item in items)
        print(
            f"{name}: at least {seconds:.2f} s; {num_output / seconds:.0f} output, {num_prompt / seconds:.0f} prompt tokens/s"
        )


if __name__ == "__main__":
    main()
