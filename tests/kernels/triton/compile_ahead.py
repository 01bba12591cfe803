"""Compiles every Triton kernel for the GPUs named on the command line, such as `80 90`, without having one.

The operations are called as a model calls them, but each launch is recorded instead of run: what is compiled is what would have
been launched. Prints one JSON line a kernel and target. A process of its own, since Triton is changed for all that use it.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from cacheflow_kernels.triton import activations, attention, cache, norms, rotary

Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]
launches: list[Launch] = []


def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    named = {name: value for name, value in options.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*arguments, **named)
    launches.append((kernel, bound.arguments, {name: value for name, value in options.items() if name not in named}))


def attend(dtype: torch.dtype, head_size: int, num_heads: int, num_kv_heads: int, *particulars: Any) -> None:
    """Decodes and chunks, with room for several splits."""
    kv = torch.empty(8, 2, num_kv_heads, 16, head_size, dtype=dtype)
    q = torch.empty(64, num_heads, head_size, dtype=dtype)
    numbers = torch.zeros(3, dtype=torch.int32)
    tables = torch.zeros(3, 200, dtype=torch.int32)
    attention.paged_attention(
        q, kv[:, 0], kv[:, 1], tables, numbers, torch.zeros(4, dtype=torch.int32), head_size**-0.5, *particulars
    )


def call_everything(dtype: torch.dtype) -> None:
    """A model of 32 query and 8 kv heads of 128."""
    attend(dtype, 128, 32, 8)
    kv = torch.empty(8, 2, 8, 16, 128, dtype=dtype)
    k = torch.empty(4, 8, 128, dtype=dtype)
    cache.store_kv(k, k, kv[:, 0], kv[:, 1], torch.zeros(4, dtype=torch.int64))
    cache.copy_blocks([kv], torch.zeros(2, 2, dtype=torch.int64))
    x = torch.empty(4, 4096, dtype=dtype)
    norms.rms_norm(x, x[0], 1e-6)
    norms.fused_add_rms_norm(x, x, x[0], 1e-6)
    norms.layer_norm(x, x[0], x[0], 1e-6)
    activations.silu_and_mul(x)
    activations.gelu_and_mul(x, "none")
    activations.gelu_and_mul(x, "tanh")
    positions = torch.zeros(4, dtype=torch.int64)
    rotary.rotary(x, x[:, :1024], positions, torch.empty(8, 128), 128, True)
    rotary.rotary(x, x[:, :1024], positions, torch.empty(8, 64), 128, False)


def compile_launch(launch: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """With the specialisations that a real launch makes: constants, ones, and multiples of 16."""
    kernel, arguments, options = launch
    signature, constants, facts = {}, {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        is_specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_specialised and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (is_specialised and value % 16 == 0):
            facts[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=facts)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps in local memory: registers that were spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


def main() -> None:
    JITFunction.run = record
    call_everything(torch.bfloat16)
    # Every feature, a head and a group that need padding, other dtypes, and the largest tiles.
    attend(torch.float16, 80, 9, 3, 100, torch.zeros(9), 30.0)
    attend(torch.float32, 64, 4, 4)
    attend(torch.bfloat16, 256, 8, 1)
    for launch in launches:
        for capability in map(int, sys.argv[1:]):
            compiled = compile_launch(launch, capability)
            result = {
                "kernel": launch[0].__name__,
                "capability": capability,
                "dtype": str(launch[1].get("q", launch[1].get("x", torch.empty(0))).dtype),
                "cubin_bytes": len(compiled.asm["cubin"]),
                "shared_bytes": compiled.metadata.shared,
                "stack_bytes": stack_bytes(compiled.asm["cubin"]),
            }
            print(json.dumps(result), flush=True)


main()
