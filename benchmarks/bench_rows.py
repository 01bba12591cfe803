"""The operations on rows on the CPU: norms, rotary embedding and gated activations, next to the same in plain torch.

Bytes are those that must move at least: every input and output once. At few rows the time is that of the call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
from torch import Tensor
from torch.nn import functional

from cacheflow_kernels import reference
from cacheflow_kernels.cpu import attention, library, rows

NUM_ROWS = (1, 8, 64, 512)
HEAD_SIZE = 64
SIZES = (576, 2048)


def best_us(function: Callable[[], object], repeats: int) -> float:
    """Microseconds of a call in the fastest of several runs of many."""
    start = time.perf_counter()
    function()
    count = max(1, int(2e-3 / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            function()
        times.append((time.perf_counter() - start) / count)
    return min(times) * 1e6


def pairs(num_rows: int, size: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
    """By operation: ours, torch's, and the elements that are read and written."""
    x, residual, weight = (
        torch.randn(num_rows, size).to(dtype),
        torch.zeros(num_rows, size, dtype=dtype),
        torch.ones(size).to(dtype),
    )
    gated, positions = torch.randn(num_rows, 2 * size).to(dtype), torch.arange(num_rows)
    table = torch.rand(num_rows, HEAD_SIZE) * 2 - 1
    q, k = torch.randn(num_rows, size).to(dtype), torch.randn(num_rows, size // 3 // HEAD_SIZE * HEAD_SIZE).to(dtype)
    elements = num_rows * size

    def torch_add_rms_norm() -> Tensor:
        return functional.rms_norm(x + residual, weight.shape, None, 1e-6) * weight

    return {
        "rms_norm": (
            lambda: rows.rms_norm(x, weight, 1e-6),
            lambda: functional.rms_norm(x, weight.shape, None, 1e-6) * weight,
            2 * elements,
        ),
        "fused_add_rms_norm": (lambda: rows.fused_add_rms_norm(x, residual, weight, 1e-6), torch_add_rms_norm, 4 * elements),
        "layer_norm": (
            lambda: rows.layer_norm(x, weight, weight, 1e-5),
            lambda: functional.layer_norm(x, weight.shape, weight, weight),
            2 * elements,
        ),
        "rotary": (
            lambda: rows.rotary(q, k, positions, table, HEAD_SIZE, True),
            lambda: reference.rotary(q, k, positions, table, HEAD_SIZE, True),
            2 * (q.numel() + k.numel()),
        ),
        "silu_and_mul": (
            lambda: rows.silu_and_mul(gated),
            lambda: functional.silu(gated[:, :size]) * gated[:, size:],
            3 * elements,
        ),
        "gelu_and_mul": (
            lambda: rows.gelu_and_mul(gated, "none"),
            lambda: functional.gelu(gated[:, :size]) * gated[:, size:],
            3 * elements,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in attention.DTYPES], default="bfloat16"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to")
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    if library.reasons():
        raise SystemExit("; ".join(library.reasons()))
    around = record.surroundings() | {"level": library.level(), "threads": torch.get_num_threads(), "dtype": options.dtype}
    for size in SIZES:
        for num_rows in NUM_ROWS:
            for op, (ours, torchs, elements) in pairs(num_rows, size, dtype).items():
                taken, torch_taken = best_us(ours, options.repeats), best_us(torchs, options.repeats)
                line = {
                    "benchmark": op,
                    "num_rows": num_rows,
                    "size": size,
                    "us": round(taken, 2),
                    "torch_us": round(torch_taken, 2),
                    "gb_per_s": round(elements * dtype.itemsize / taken / 1e3, 2),
                }
                print(json.dumps(line), flush=True)
                record.write(options.output, line | around)


if __name__ == "__main__":
    main()
