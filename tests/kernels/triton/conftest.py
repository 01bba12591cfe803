"""The tests here run the Triton kernels: on a GPU, or in the interpreter under `TRITON_INTERPRET=1` (see ../test_triton.py)."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from cacheflow_kernels.triton import is_interpreted

collect_ignore_glob = [] if is_interpreted() or torch.cuda.is_available() else ["test_*.py"]
if find_spec("cacheflow") is None:
    collect_ignore_glob.append("test_engine_plugins.py")  # this package is tested without the engine, too
