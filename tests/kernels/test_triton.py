"""The Triton kernels in the interpreter, in a process of its own: the interpreter is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cacheflow_kernels import triton
from cacheflow_kernels.ops import REGISTRY

FOLDER = Path(__file__).parent / "triton"


def test_the_kernels_are_right_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("op", triton.OPS)
def test_each_operation_says_why_triton_cannot_run_it_on_a_cpu(op: str) -> None:
    assert REGISTRY.reasons(op, torch.device("cpu"), torch.float16)["triton"] == ("needs a CUDA device, not cpu",)


def test_a_dtype_without_kernels_is_a_reason_why_not() -> None:
    assert any("torch.float64 is not one of" in reason for reason in triton.reasons(torch.device("cpu"), torch.float64))


def test_the_package_imports_no_triton_before_a_kernel_runs() -> None:
    modules = "cacheflow_kernels.attention, cacheflow_kernels.providers, cacheflow_kernels.xformers"
    code = f"import sys, {modules}; assert not {{'triton', 'xformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
