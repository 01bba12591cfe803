"""The shared object with the CPU kernels: whether it can be used here, and at which level of instruction sets.

It knows no operation: `linear`, `rows` and `attention` declare the functions that they call.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

# Before the library: both then share torch's copy of the OpenMP runtime. Two copies in one process cost a factor of 60.
import torch

PATH = Path(__file__).with_name("_cpu.so")
LEVELS = ("none", "avx2", "avx512", "avx512bf16", "amx")
"""In the order of `Level` in level.h."""


@cache
def load() -> ctypes.CDLL | None:
    """The library at the level of `level()`, or None where `reasons()` says why not.

    Raises:
        ValueError: CACHEFLOW_CPU_LEVEL names no level, or one that this machine lacks.
    """
    if not PATH.is_file():
        return None
    library = ctypes.CDLL(str(PATH))
    machine = int(library.cf_machine_level())
    wanted = os.environ.get("CACHEFLOW_CPU_LEVEL", LEVELS[machine])
    if wanted not in LEVELS[1 : machine + 1] and wanted != LEVELS[machine]:
        usable = ", ".join(LEVELS[1 : machine + 1]) or "none"
        raise ValueError(f"CACHEFLOW_CPU_LEVEL={wanted} can't be had on this machine. Usable levels: {usable}.")
    library.cf_set_level(LEVELS.index(wanted))
    return library


def level() -> str:
    """The instruction sets in use: one of `LEVELS`; CACHEFLOW_CPU_LEVEL chooses one below the machine's."""
    library = load()
    return "none" if library is None else LEVELS[ctypes.c_int.in_dll(library, "cf_current_level").value]


def reasons() -> tuple[str, ...]:
    """Why the CPU kernels can't be used on this machine; empty: they can."""
    if load() is None:
        return (
            f"the package was installed without its compiled CPU kernels ({PATH.name}): install g++, then install it again",
        )
    if level() == "none":
        return ("this CPU lacks AVX2",)
    return ()


def check_cpu(device: torch.device) -> tuple[str, ...]:
    """`reasons()`, and the one that `device` is not a CPU."""
    return reasons() if device.type == "cpu" else (f"{device} is not a CPU",)
