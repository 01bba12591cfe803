"""Where each system is installed, and the variables that it wants: those of vLLM are what its documentation asks for."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))
KV_CACHE_GB = 2
"""Room for keys and values of every system that can be told."""
VLLM_VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}-{CORES[-1]}",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
VLLM_PRELOADS = ("libtcmalloc_minimal.so.4", "libiomp5.so")
"""Where its environment or the system has them."""


def python_of(name: str, given: dict[str, Path]) -> Path:
    """The interpreter of a system's environment: given by hand, this one for cacheflow, or that of hatch."""
    base = name.removesuffix("-continuous").removesuffix("-q4")
    if base in given:
        return given[base]
    folder = Path(__file__).parents[2] / ".venvs" / f"peers-{base}"
    return Path(sys.executable) if base.startswith("cacheflow") else folder / "bin" / "python"


def parse_pythons(entries: list[str]) -> dict[str, Path]:
    """`NAME=PATH`, as commands take them."""
    return {name: Path(path) for name, _, path in (entry.partition("=") for entry in entries)}


def variables(name: str, python: Path) -> dict[str, str]:
    """What is added to the environment of its processes."""
    if name == "transformers":
        # Its server lists what is in that folder, and fails where there is none.
        return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": tempfile.gettempdir()}
    if not name.startswith("vllm"):
        return {}
    folders = (python.parent.parent / "lib", Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"))
    found = [next((folder / name for folder in folders if (folder / name).exists()), None) for name in VLLM_PRELOADS]
    return VLLM_VARIABLES | {"LD_PRELOAD": ":".join(str(path) for path in found if path)}
