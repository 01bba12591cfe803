"""The operations in Triton, one source for NVIDIA GPUs of compute capability 8.0 and up, and when they can run.

This module imports no Triton: the package is installed without it, too. Under `TRITON_INTERPRET=1` the kernels run on a CPU,
slowly, one program after the other; that is for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels take."""
MIN_CAPABILITY = (8, 0)
"""The oldest GPUs that they are compiled and checked for."""
MAX_HEAD_SIZE = 256
"""Elements of a head of which a tile fits into every GPU's shared memory."""
OPS = {
    "paged_attention": "attention",
    "store_kv": "cache",
    "copy_blocks": "cache",
    "rms_norm": "norms",
    "fused_add_rms_norm": "norms",
    "layer_norm": "norms",
    "rotary": "rotary",
    "silu_and_mul": "activations",
    "gelu_and_mul": "activations",
}
"""Each operation with the module it is in. `swap_blocks` is not here: copies between devices are the driver's work."""


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Why the kernels can't run there."""
    found = []
    if find_spec("triton") is None:
        found.append("triton is not installed (pip install 'cacheflow-kernels[triton]')")
    if dtype not in DTYPES:
        found.append(f"{dtype} is not one of {', '.join(str(known) for known in DTYPES)}")
    if is_interpreted():
        if device.type != "cpu":
            found.append(f"TRITON_INTERPRET=1 runs kernels on the CPU, not on {device}")
        if dtype == torch.bfloat16:
            found.append("Triton's interpreter gets bfloat16 wrong")
    elif device.type != "cuda":
        found.append(f"needs a CUDA device, not {device}")
    elif not torch.cuda.is_available():
        found.append("torch finds no CUDA device")
    elif torch.version.cuda is None:
        found.append("needs an NVIDIA GPU")
    elif torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        found.append(f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}")
    return tuple(found)


def function(op: str) -> Callable[..., Any]:
    """The operation; its module, and Triton with it, is imported on the first call."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{OPS[op]}"), op)(*arguments)

    return call
