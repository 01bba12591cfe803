"""Every Triton kernel compiles to machine code ahead of time, without a GPU, and fits the GPUs that it is compiled for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = ("80", "90")
KERNELS = {
    "_activate_and_mul",
    "_add_splits",
    "_attend_chunk",
    "_attend_split",
    "_layer_norm",
    "_move_blocks",
    "_rms_norm",
    "_rotary",
    "_store_kv",
}
SHARED_BYTES = 99 * 1024
"""What a program may have on the GPUs with the least of it: 8.6, 8.9 and 12.0."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    script = Path(__file__).parent / "triton" / "compile_ahead.py"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script), *CAPABILITIES], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_becomes_machine_code(compiled: list[dict[str, Any]], capability: str) -> None:
    made = {result["kernel"] for result in compiled if result["capability"] == int(capability) and result["cubin_bytes"] > 0}
    assert made == KERNELS


def test_every_program_fits_into_shared_memory(compiled: list[dict[str, Any]]) -> None:
    assert [result for result in compiled if result["shared_bytes"] > SHARED_BYTES] == []


def test_no_16_bit_kernel_spills_registers(compiled: list[dict[str, Any]]) -> None:
    assert [result for result in compiled if result["stack_bytes"] > 0 and result["dtype"] != "torch.float32"] == []
