"""cacheflow, for `compare.py`: a fresh `LLM` for every run, so that no run finds the prefixes of an earlier one."""

from __future__ import annotations

import sys

from offline import run_cacheflow

from peers.protocol import Run, serve


def load() -> Run:
    """Nothing to load before a run."""
    quantization = sys.argv[2] if len(sys.argv) > 2 else "none"
    options = {} if quantization == "none" else {"quantization": quantization}
    return lambda items, n: run_cacheflow("demo", items, n, **options)


if __name__ == "__main__":
    serve("cacheflow", ("cacheflow-engine", "cacheflow-kernels", "torch"), load)
