"""cacheflow, for `compare.py`: a fresh `LLM` for every run, so that no run finds the prefixes of an earlier one."""

from __future__ import annotations

import sys
from pathlib import Path

from offline import run_cacheflow

from peers.protocol import Run, serve


def load() -> Run:
    """Nothing to load before a run."""
    quantization = sys.argv[2] if len(sys.argv) > 2 else "none"
    model = str(Path(sys.argv[1]) / "hf")
    return lambda items, n: run_cacheflow(model, items, n, quantization=quantization, tokenizer="demo")


if __name__ == "__main__":
    serve("cacheflow", ("cacheflow-engine", "cacheflow-kernels", "torch"), load)
