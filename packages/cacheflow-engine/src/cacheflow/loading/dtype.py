"""Chooses the dtype of weights and arithmetic.

It knows what was asked for, what the checkpoint is stored in and what the device computes in; it opens no files but the
processor's own description.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheflow.errors import ConfigError

if TYPE_CHECKING:
    import torch

_NAMES = {"half": "float16", "float": "float32", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
_AUTO = ("auto", "default")


def choose_dtype(requested: str, hf_config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The dtype to load and to compute in.

    Under "auto" (or "default") it is the checkpoint's own, except that float16 becomes float32 on a CPU: nothing is lost, and
    CPUs don't compute in it. A checkpoint that is stored in fewer bits than any arithmetic (a quantised GGUF, whose
    configuration names no dtype) gets bfloat16 where the device computes in it, else float32.

    Args:
        requested: The `dtype` option.
        hf_config: The checkpoint's configuration.
        device: Where the model will run.

    Raises:
        ConfigError: The name is not one of the option's choices.
    """
    import torch

    if requested in _AUTO:
        name = _NAMES.get(stored_dtype(hf_config) or "")
        if name is None:
            name = "bfloat16" if computes_in_bfloat16(device) else "float32"
        elif name == "float16" and device.type == "cpu":
            name = "float32"
    elif requested in _NAMES:
        name = _NAMES[requested]
    else:
        raise ConfigError(f"--dtype must be one of {', '.join((*_AUTO, *_NAMES))}, got {requested!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def stored_dtype(hf_config: Mapping[str, Any]) -> str | None:
    """What the configuration says the weights are stored in ("float16", …), or None."""
    value = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return str(value).removeprefix("torch.") if value else None


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, not by converting it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"} & _processor_flags())


@cache
def _processor_flags() -> frozenset[str]:
    """Features of the processor as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").split())
