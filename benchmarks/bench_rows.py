"""The operations beside attention and products on the CPU, next to the same in plain torch.

Norms, rotary embedding, gated activations, what sampling asks of logits, storing keys and values, copying blocks. Bytes are
those that must move at least: every input and output once. FLOP count an exponential as one. The ratio is to the speed at which
the machine reads memory, measured in the same run; what comes from a cache can be above 1. At few rows the time is the call's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn import functional

import cacheflow_kernels
from cacheflow_kernels import reference
from cacheflow_kernels.cpu import attention, library, rows

NUM_ROWS = (1, 8, 64, 512)
HEAD_SIZE = 64
SIZES = (576, 2048)
VOCAB_SIZE = 49_152
MAX_SORTED_ROWS = 64
"""More rows than that take torch seconds to sort."""
BLOCK_SIZE = 16
NUM_KV_HEADS = 8
NUM_BLOCKS = 2048
"""67 MB of keys and values in bfloat16: more than a core's caches."""
PROBE_ELEMENTS = 2**27
"""512 MB, whose sum is read at the speed of memory."""

Pair = tuple[Callable[[], object], Callable[[], object], int, int]
"""Ours, torch's, the bytes that move, the FLOP."""


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


def of_hidden_states(num_rows: int, size: int, dtype: torch.dtype) -> dict[str, Pair]:
    """What layers do to rows of hidden states."""
    x, residual, weight = (
        torch.randn(num_rows, size).to(dtype),
        torch.zeros(num_rows, size, dtype=dtype),
        torch.ones(size).to(dtype),
    )
    gated, positions = torch.randn(num_rows, 2 * size).to(dtype), torch.arange(num_rows)
    table = torch.rand(num_rows, HEAD_SIZE) * 2 - 1
    q, k = torch.randn(num_rows, size).to(dtype), torch.randn(num_rows, size // 3 // HEAD_SIZE * HEAD_SIZE).to(dtype)
    count, num_bytes = num_rows * size, num_rows * size * dtype.itemsize

    def torch_add_rms_norm() -> Tensor:
        return functional.rms_norm(x + residual, weight.shape, None, 1e-6) * weight

    return {
        "rms_norm": (
            lambda: rows.rms_norm(x, weight, 1e-6),
            lambda: functional.rms_norm(x, weight.shape, None, 1e-6) * weight,
            2 * num_bytes,
            4 * count,
        ),
        "fused_add_rms_norm": (
            lambda: rows.fused_add_rms_norm(x, residual, weight, 1e-6),
            torch_add_rms_norm,
            4 * num_bytes,
            5 * count,
        ),
        "layer_norm": (
            lambda: rows.layer_norm(x, weight, weight, 1e-5),
            lambda: functional.layer_norm(x, weight.shape, weight, weight),
            2 * num_bytes,
            7 * count,
        ),
        "rotary": (
            lambda: rows.rotary(q, k, positions, table, HEAD_SIZE, True),
            lambda: reference.rotary(q, k, positions, table, HEAD_SIZE, True),
            2 * (q.nbytes + k.nbytes),
            3 * (q.numel() + k.numel()),
        ),
        "silu_and_mul": (
            lambda: rows.silu_and_mul(gated),
            lambda: functional.silu(gated[:, :size]) * gated[:, size:],
            3 * num_bytes,
            4 * count,
        ),
        "gelu_and_mul": (
            lambda: rows.gelu_and_mul(gated, "none"),
            lambda: functional.gelu(gated[:, :size]) * gated[:, size:],
            3 * num_bytes,
            5 * count,
        ),
    }


def of_logits(num_rows: int, dtype: torch.dtype) -> dict[str, Pair]:
    """What sampling asks of rows of logits. Beside draws it is the reference, which sorts all of a row in float64."""
    x = (torch.randn(num_rows, VOCAB_SIZE) * 3).to(dtype)
    all_rows, temperatures = torch.arange(num_rows), torch.full((num_rows,), 0.8)
    numbers = torch.rand(num_rows, dtype=torch.float64)

    def torch_maxima() -> object:
        wide = x.float()
        return wide.max(dim=1), wide.logsumexp(dim=1)

    def drawn(x: Tensor, *filters: Tensor | None) -> Pair:
        arguments: tuple[Any, ...] = (x, all_rows, temperatures, numbers, *filters)
        return lambda: rows.draw_rows(*arguments), lambda: reference.draw_rows(*arguments), x.nbytes, 8 * x.numel()

    pairs: dict[str, Pair] = {
        "row_maxima": (lambda: rows.row_maxima(x), torch_maxima, x.nbytes, 4 * x.numel()),
        "draw_rows": drawn(x),
    }
    if num_rows <= MAX_SORTED_ROWS:
        top_k, top_p = torch.full((num_rows,), 50), torch.full((num_rows,), 0.9, dtype=torch.float64)
        # Nearly flat: top_p leaves most of the vocabulary.
        flat = (torch.randn(num_rows, VOCAB_SIZE) / 10).to(dtype)
        pairs |= {
            "draw_rows, top_k 50": drawn(x, top_k),
            "draw_rows, top_p 0.9": drawn(x, None, top_p),
            "draw_rows, top_k 50 and top_p 0.9": drawn(x, top_k, top_p),
            "draw_rows, top_p 0.9, nearly flat rows": drawn(flat, None, top_p),
            "draw_rows, min_p 0.05": drawn(x, None, None, torch.full((num_rows,), 0.05)),
        }
    return pairs


def of_the_cache(num_rows: int, dtype: torch.dtype) -> dict[str, Pair]:
    """What is done to a cache of keys and values: a token's are stored, or a block is copied, for each row."""
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    k_cache, v_cache = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    k, v = (torch.randn(num_rows, NUM_KV_HEADS, HEAD_SIZE).to(dtype) for _ in range(2))
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_rows]
    blocks = torch.randperm(NUM_BLOCKS)[: 2 * num_rows].view(-1, 2)
    block_bytes = k_cache[0].nbytes

    def store(implementation: str) -> None:
        cacheflow_kernels.store_kv(k, v, k_cache, v_cache, slots, implementation=implementation)

    def copy(implementation: str) -> None:
        cacheflow_kernels.copy_blocks([k_cache, v_cache], blocks, implementation=implementation)

    return {
        "store_kv": (lambda: store("cpu"), lambda: store("reference"), 4 * k.nbytes, 0),
        "copy_blocks": (lambda: copy("cpu"), lambda: copy("reference"), 4 * num_rows * block_bytes, 0),
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
    probe = torch.ones(PROBE_ELEMENTS)
    read_gb_per_s = probe.nbytes / best_us(probe.sum, options.repeats) / 1e3
    del probe
    measured = [({"size": size}, num_rows, of_hidden_states(num_rows, size, dtype)) for size in SIZES for num_rows in NUM_ROWS]
    measured += [({"size": VOCAB_SIZE}, num_rows, of_logits(num_rows, dtype)) for num_rows in NUM_ROWS]
    measured += [({}, num_rows, of_the_cache(num_rows, dtype)) for num_rows in NUM_ROWS]
    for what, num_rows, operations in measured:
        for op, (ours, torchs, num_bytes, flop) in operations.items():
            taken, torch_taken = best_us(ours, options.repeats), best_us(torchs, options.repeats)
            line = {
                "benchmark": op,
                "num_rows": num_rows,
                **what,
                "us": round(taken, 2),
                "torch_us": round(torch_taken, 2),
                "bytes": num_bytes,
                "flop": flop,
                "gb_per_s": round(num_bytes / taken / 1e3, 2),
                "read_gb_per_s": round(read_gb_per_s, 2),
                "ratio_to_read": round(num_bytes / taken / 1e3 / read_gb_per_s, 3),
            }
            print(json.dumps(line), flush=True)
            record.write(options.output, line | around)


if __name__ == "__main__":
    main()
