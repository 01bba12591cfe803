"""Paged attention on the CPU: decodes against the machine's read bandwidth, prompts against torch's attention.

Decodes run over at least 256 MB of keys and values, so that these come from memory. Each measurement is one JSON line: medians
of calls that took turns with what they are compared with, as the speed of memory and the clock change while a benchmark runs.
torch's attention on prompts is given its keys and values ready and contiguous, and uses AMX where the machine has it:
CACHEFLOW_CPU_LEVEL limits our kernels only. With THP_MEM_ALLOC_ENABLE=1 torch takes huge pages, for the cache and for the array
whose reading is the measure of bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from torch.nn.functional import scaled_dot_product_attention

from cacheflow_kernels.cpu import attention, library

KV_BYTES = 256 * 2**20
BLOCK_SIZE = 16
SHAPES = ((32, 8, 128), (8, 8, 128), (9, 3, 64))
"""(heads, kv heads, head size); the last one is SmolLM2's."""
CONTEXTS = (256, 512, 2048, 8192)
PROMPTS = (512, 2048)


def medians_s(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function, called in turns, after a first turn that is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


def make_cache(shape: tuple[int, int, int], num_blocks: int, dtype: torch.dtype) -> tuple[torch.Tensor, attention.Cache]:
    """A cache tensor as the engine's backend lays it out, filled with one megabyte of random numbers over and over."""
    _, num_kv_heads, head_size = shape
    size = (num_blocks, 2, num_kv_heads, BLOCK_SIZE, head_size)
    kv = torch.randn(2**20).to(dtype).repeat(-(-torch.Size(size).numel() // 2**20))[: torch.Size(size).numel()].view(size)
    half = kv.stride(0) * kv.element_size() // 2
    return kv, attention.Cache(kv.data_ptr(), kv.data_ptr() + half, kv.stride(0))


def make_layer(shape: tuple[int, int, int], dtype: torch.dtype) -> attention.Layer:
    num_heads, num_kv_heads, head_size = shape
    return attention.Layer.of((num_heads, num_kv_heads, head_size, BLOCK_SIZE), dtype, head_size**-0.5, None, None, None)


def decode(shape: tuple[int, int, int], context: int, dtype: torch.dtype, probe: torch.Tensor, repeats: int) -> dict[str, Any]:
    num_heads, num_kv_heads, head_size = shape
    bytes_per_seq = context * num_kv_heads * head_size * 2 * dtype.itemsize
    num_seqs, blocks_per_seq = -(-KV_BYTES // bytes_per_seq), -(-context // BLOCK_SIZE)
    kv, cache = make_cache(shape, num_seqs * blocks_per_seq, dtype)
    tables = torch.randperm(len(kv), dtype=torch.int32).view(num_seqs, blocks_per_seq)
    lens, starts = torch.full((num_seqs,), context, dtype=torch.int32), torch.arange(num_seqs + 1, dtype=torch.int32)
    batch, layer = attention.Batch.of(starts, lens, tables), make_layer(shape, dtype)
    q = torch.randn(num_seqs, num_heads, head_size).to(dtype)
    seconds, probe_s = medians_s((lambda: attention.attend(layer, q, cache, batch), probe.sum), repeats)
    speed, bandwidth = num_seqs * bytes_per_seq / seconds / 1e9, probe.nbytes / probe_s / 1e9
    return {
        "phase": "decode",
        "context": context,
        "num_seqs": num_seqs,
        "ms": round(seconds * 1e3, 3),
        "gb_per_s": round(speed, 2),
        "read_gb_per_s": round(bandwidth, 2),
        "ratio_to_read": round(speed / bandwidth, 3),
    }


def prefill(shape: tuple[int, int, int], length: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    num_heads, num_kv_heads, head_size = shape
    kv, cache = make_cache(shape, length // BLOCK_SIZE, dtype)
    tables = torch.arange(len(kv), dtype=torch.int32)[None]
    starts, lens = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    batch, layer = attention.Batch.of(starts, lens, tables), make_layer(shape, dtype)
    q = torch.randn(length, num_heads, head_size).to(dtype)
    dense = kv.permute(1, 2, 0, 3, 4).reshape(2, 1, num_kv_heads, length, head_size).contiguous()
    queries = q.transpose(0, 1)[None]

    def torchs_attention() -> torch.Tensor:
        return scaled_dot_product_attention(queries, dense[0], dense[1], is_causal=True, enable_gqa=num_heads != num_kv_heads)

    ours, torchs = medians_s((lambda: attention.attend(layer, q, cache, batch), torchs_attention), repeats)
    flop = 2 * num_heads * head_size * length * (length + 1)
    return {
        "phase": "prefill",
        "length": length,
        "ms": round(ours * 1e3, 3),
        "torch_ms": round(torchs * 1e3, 3),
        "gflop_per_s": round(flop / ours / 1e9, 1),
        "times_torchs_speed": round(torchs / ours, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in attention.DTYPES], default="bfloat16"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to")
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    if library.reasons():
        raise SystemExit("; ".join(library.reasons()))
    probe = torch.ones(2**27)  # 512 MB: their sum is read at the speed of memory
    torch.manual_seed(0)
    around = record.surroundings() | {"level": library.level(), "threads": torch.get_num_threads(), "dtype": options.dtype}
    around["huge_pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    for shape in SHAPES:
        measured = [decode(shape, context, dtype, probe, options.repeats) for context in CONTEXTS]
        measured += [prefill(shape, length, dtype, options.repeats) for length in PROMPTS]
        for result in measured:
            line = {"benchmark": "paged_attention", "heads_kv_heads_head_size": shape} | result
            print(json.dumps(line), flush=True)
            record.write(options.output, line | around)


if __name__ == "__main__":
    main()
