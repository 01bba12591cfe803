"""The GPU kernels beside the card's limits and torch: time, bytes or FLOP, and their ratio to a limit measured in the same run.

What moves bytes stands beside a large copy within the card's memory, bytes read plus bytes written; prompt attention beside
torch's SDPA, by its flash and cuDNN kernels. Calls are captured in a CUDA graph, so that Python's share is left out, and inputs
take turns, so that they come from memory. `gpu.sh` runs it; alone:

    PYTHONPATH=packages/cacheflow-kernels/src python benchmarks/bench_gpu.py --only decode
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, surroundings, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cacheflow_kernels import (
    copy_blocks,
    fused_add_rms_norm,
    gelu_and_mul,
    layer_norm,
    paged_attention,
    rms_norm,
    rotary,
    silu_and_mul,
    store_kv,
    swap_blocks,
)
from cacheflow_kernels.ops import REGISTRY

GPU = torch.device("cuda", 0)
DTYPE = torch.bfloat16
ROUNDS = 15
TURN_BYTES = 1 << 30
"""Inputs take turns until they hold as much: many times the second-level cache."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """One line of output.

    Attributes:
        benchmark: What was measured.
        implementation: By whom.
        shape: Of the input, in words.
        milliseconds: Of one call.
        gigabytes_per_second: Bytes that must be moved, by time; None where arithmetic is the limit.
        teraflops: Likewise of arithmetic.
        ratio: To the limit: copy bandwidth, or torch's fastest attention (above 1: faster than that).
    """

    benchmark: str
    implementation: str
    shape: str
    milliseconds: float
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    ratio: float | None = None

    def __str__(self) -> str:
        rate = f"{self.teraflops:8.1f} TFLOP/s" if self.teraflops else f"{self.gigabytes_per_second or 0:8.0f} GB/s   "
        ratio = "" if self.ratio is None else f"  {self.ratio:5.2f} of the limit"
        return f"{self.benchmark:<20} {self.implementation:<10} {self.shape:<52} {self.milliseconds:9.4f} ms {rate}{ratio}"


def milliseconds(calls: Sequence[Call], is_captured: bool = True) -> float:
    """The median over `ROUNDS` of the mean time of one of the calls, which run in turn."""
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if is_captured:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    times: list[float] = []
    for number in range(ROUNDS + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if is_captured:
            graph.replay()
        else:
            for call in calls:
                call()
        stop.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(times)


def random(*shape: int) -> torch.Tensor:
    """Normal numbers on the card."""
    return torch.empty(*shape, dtype=DTYPE, device=GPU).normal_()


def turns(num_bytes: int) -> int:
    """How many inputs of that size take turns."""
    return max(2, -(-TURN_BYTES // num_bytes))


def implementations(op: str) -> list[str]:
    """Those that can run here, and the reference, which is torch."""
    return [name for name, why_not in REGISTRY.reasons(op, GPU, DTYPE).items() if not why_not]


def copy_bandwidth() -> float:
    """GB/s of a copy within the card's memory, bytes read plus bytes written."""
    source, target = (torch.empty(1 << 30, dtype=torch.int16, device=GPU).random_() for _ in range(2))
    num_bytes: int = 2 * source.nbytes
    return num_bytes / milliseconds([partial(target.copy_, source)] * 3) / 1e6


def decode(limit: float) -> Iterator[Measurement]:
    """One query token a sequence over long contexts; bytes: keys and values once, queries and results."""
    for batch, context, heads, kv_heads, head_size in (
        (64, 4096, 32, 8, 128),
        (64, 4096, 8, 8, 128),
        (64, 4096, 64, 8, 128),
        (256, 1024, 32, 8, 128),
        (8, 8192, 32, 8, 128),
        (1, 32768, 32, 8, 128),
        (64, 4096, 9, 3, 64),
        (64, 4096, 32, 8, 256),
    ):
        blocks = batch * context // 16
        num_bytes = 2 * batch * context * kv_heads * head_size * 2 + 2 * batch * heads * head_size * 2
        caches = [random(blocks, 2, kv_heads, 16, head_size) for _ in range(turns(num_bytes))]
        q = random(batch, heads, head_size)
        tables = torch.randperm(blocks, device=GPU).to(torch.int32).view(batch, -1)
        lens = torch.full((batch,), context, dtype=torch.int32, device=GPU)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=GPU)
        for name in implementations("paged_attention"):
            if name == "reference":
                continue
            batch_of = (tables, lens, starts)
            calls = [partial(paged_attention, q, kv[:, 0], kv[:, 1], *batch_of, implementation=name) for kv in caches]
            time = milliseconds(calls)
            rate = num_bytes / time / 1e6
            shape = f"batch {batch} x {context}, heads {heads}/{kv_heads} x {head_size}"
            yield Measurement("decode", name, shape, time, gigabytes_per_second=rate, ratio=rate / limit)


def prefill(limit: float) -> Iterator[Measurement]:
    """Whole prompts, causal; FLOP: two products of half a square of scores."""
    heads, kv_heads, head_size = 32, 8, 128
    for batch, length in ((16, 512), (4, 2048), (1, 8192), (2, 8192)):
        shape = f"{batch} x {length} tokens, heads {heads}/{kv_heads} x {head_size}"
        flop = 4 * batch * heads * head_size * length * (length + 1) / 2
        q = random(batch, heads, length, head_size)
        k, v = random(2, batch, kv_heads, length, head_size)
        times = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    attend = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
                    times[backend.name] = milliseconds([attend] * 5)
            except RuntimeError as error:
                print(f"torch's {backend.name} left out: {str(error).splitlines()[0]}")
        fastest = min(times.values(), default=None)
        rows = q.transpose(1, 2).flatten(0, 1).contiguous()
        kv = torch.stack((k, v), dim=1).unflatten(3, (-1, 16)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1).contiguous()
        tables = torch.arange(batch * length // 16, dtype=torch.int32, device=GPU).view(batch, -1)
        lens = torch.full((batch,), length, dtype=torch.int32, device=GPU)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=GPU) * length
        for name in implementations("paged_attention"):
            if name != "reference":
                inputs = (rows, kv[:, 0], kv[:, 1], tables, lens, starts)
                times[name] = milliseconds([partial(paged_attention, *inputs, implementation=name)] * 5)
        for name, time in times.items():
            ratio = None if fastest is None else fastest / time
            yield Measurement("prefill", name, shape, time, teraflops=flop / time / 1e9, ratio=ratio)


def row_operations(limit: float) -> Iterator[Measurement]:
    """Norms, rotary embedding and gated products over 16,384 tokens; bytes: each input and output once."""
    tokens, size = 16384, 4096
    inputs = [random(tokens, size) for _ in range(turns(2 * tokens * size * 2))]
    others = [random(tokens, size) for _ in inputs]
    weight = random(size)
    positions = torch.arange(tokens, device=GPU)
    cos_sin = torch.rand(tokens, 128, device=GPU)
    row_bytes = tokens * size * 2
    operations: tuple[tuple[Callable[..., Any], float, Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]]], ...] = (
        (rms_norm, 2, lambda x, y: (x, weight)),
        (fused_add_rms_norm, 4, lambda x, y: (x, y, weight)),
        (layer_norm, 2, lambda x, y: (x, weight, weight)),
        (silu_and_mul, 1.5, lambda x, y: (x,)),
        (gelu_and_mul, 1.5, lambda x, y: (x,)),
        (rotary, 2.5, lambda x, y: (x, y[:, : size // 4], positions, cos_sin, 128)),
    )
    for function, passes, arguments in operations:
        for name in implementations(function.__name__):
            calls = [partial(function, *arguments(x, y), implementation=name) for x, y in zip(inputs, others, strict=True)]
            time = milliseconds(calls)
            rate = passes * row_bytes / time / 1e6
            yield Measurement(
                function.__name__, name, f"{tokens} x {size}", time, gigabytes_per_second=rate, ratio=rate / limit
            )


def cache_operations(limit: float) -> Iterator[Measurement]:
    """Writing into the cache, copying its blocks, and swapping them with pinned memory of the host."""
    tokens, heads, head_size, layers = 16384, 8, 128, 16
    k, v = random(2, tokens, heads, head_size)
    caches = [random(tokens // 16, 2, heads, 16, head_size) for _ in range(layers)]
    slots = torch.randperm(tokens, device=GPU)
    for name in implementations("store_kv"):
        if name != "reference":
            calls = [partial(store_kv, k, v, kv[:, 0], kv[:, 1], slots, implementation=name) for kv in caches]
            time = milliseconds(calls)
            rate = 2 * (k.nbytes + v.nbytes) / time / 1e6
            yield Measurement("store_kv", name, f"{tokens} tokens", time, gigabytes_per_second=rate, ratio=rate / limit)
    half = tokens // 32
    pairs = torch.stack((torch.randperm(half), half + torch.randperm(half)), dim=1)
    for name in implementations("copy_blocks"):
        time = milliseconds([partial(copy_blocks, caches, pairs, implementation=name)] * 3, is_captured=False)
        rate = 2 * layers * half * caches[0][0].nbytes / time / 1e6
        shape = f"{half} blocks of {layers} layers"
        yield Measurement("copy_blocks", name, shape, time, gigabytes_per_second=rate, ratio=rate / limit)
    host = torch.empty(half, *caches[0].shape[1:], dtype=DTYPE, pin_memory=True)
    there = torch.stack((torch.randperm(tokens // 16)[:half], torch.arange(half)), dim=1)
    for name in implementations("swap_blocks"):
        for shape, source, target, order in (
            ("to the host", caches[0], host, there),
            ("to the card", host, caches[0], there.flip(1)),
        ):
            swap = partial(swap_blocks, source, target, order, implementation=name)
            time = milliseconds([swap] * 3, is_captured=False)
            rate = host.nbytes / time / 1e6
            yield Measurement("swap_blocks", name, f"{half} blocks {shape}", time, gigabytes_per_second=rate)


def versions() -> dict[str, str]:
    """Of what is around torch: the driver and the compiler."""
    found = {"cuda": str(torch.version.cuda)}
    for name, command, pattern in (
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"[\d.]+"),
        ("nvcc", ["nvcc", "--version"], r"V([\d.]+)"),
    ):
        if shutil.which(command[0]):
            match = re.search(pattern, subprocess.run(command, capture_output=True, text=True, check=False).stdout)
            found[name] = "unknown" if match is None else match.group(match.lastindex or 0)
    return found


BENCHMARKS = {"decode": decode, "prefill": prefill, "rows": row_operations, "cache": cache_operations}


def main() -> None:
    """Runs them and appends to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>-<date>.jsonl")
    parser.add_argument(
        "--checks", nargs="*", default=[], metavar="NAME=RESULT", help="what was checked before, to be written down"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU: nothing was measured.")
    torch.manual_seed(0)
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    day = datetime.now(timezone.utc).date().isoformat()
    output = options.output or FOLDER / "results" / f"{gpu}-{day}.jsonl"
    around = surroundings()
    around["versions"] |= versions()
    write(output, around | {"benchmark": "checks", "results": dict(check.split("=", 1) for check in options.checks)})
    limit = copy_bandwidth()
    copied = Measurement("copy", "torch", "2 GiB within the card", 4 * (1 << 30) / limit / 1e6, gigabytes_per_second=limit)
    print(copied)
    write(output, around | asdict(copied))
    for name in options.only:
        for measurement in BENCHMARKS[name](limit):
            print(measurement, flush=True)
            write(output, around | asdict(measurement))
        torch.cuda.empty_cache()
    print(f"written to {output}")


if __name__ == "__main__":
    main()
