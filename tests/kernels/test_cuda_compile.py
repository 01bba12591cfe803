"""The CUDA sources compile for every target, and on a machine without a GPU the loader says why they can't run."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest
import torch

from cacheflow_kernels import paged_attention
from cacheflow_kernels.accuracy import PagedCase, paged_inputs
from cacheflow_kernels.attention import CudaAttention
from cacheflow_kernels.cuda import library
from cacheflow_kernels.ops import REGISTRY
from cacheflow_kernels.registry import UnsupportedError

ROOT = Path(__file__).parents[2] / "packages" / "cacheflow-kernels"
COMPILE = run_path(str(ROOT / "compile_kernels.py"))
CPU = torch.device("cpu")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The shared object of the current sources; compiled here only where installing the package has not done so."""
    path, reason = COMPILE["CUDA"].build()
    assert path is not None, reason
    return Path(path)


def cuobjdump() -> str | None:
    """The program, from the PATH or from Triton's wheel."""
    triton = find_spec("triton")
    folders = [] if triton is None else [str(Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin")]
    return shutil.which("cuobjdump") or next((found for f in folders if (found := shutil.which("cuobjdump", path=f))), None)


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump on the PATH or in Triton's wheel")
def test_every_source_has_machine_code_for_every_target(compiled: Path) -> None:
    program = cuobjdump()
    assert program is not None
    listing = subprocess.run([program, "--list-elf", str(compiled)], capture_output=True, text=True, check=True).stdout
    targets = [int(target) for target in re.findall(r"\.sm_(\d+)\.cubin", listing)]
    assert set(targets) == set(COMPILE["CUDA_TARGETS"])
    num_sources = len(list((ROOT / "src" / "cacheflow_kernels" / "cuda").glob("*.cu")))
    # The linker adds one of its own.
    assert {targets.count(target) for target in targets} == {num_sources + 1}


@needs_nvcc
def test_the_compiled_kernels_load_without_a_driver_or_gpu(compiled: Path) -> None:
    loaded = library.load()
    assert loaded is not None
    assert loaded.cacheflow_split_size() == 512


@needs_nvcc
@without_gpu
def test_without_a_gpu_cuda_itself_says_so(compiled: Path) -> None:
    loaded = library.load()
    assert loaded is not None
    # 35: no driver, or too old a one; 100: no device.
    assert loaded.cacheflow_device_error() in (35, 100)


def test_a_package_without_compiled_kernels_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "_cuda.so")
    library.load.cache_clear()
    library.reasons.cache_clear()
    try:
        (reason,) = library.reasons()
    finally:
        library.load.cache_clear()
        library.reasons.cache_clear()
    assert reason.startswith("the package was installed without its compiled CUDA kernels (_cuda.so): put nvcc 13 on the PATH")


@without_gpu
@pytest.mark.parametrize(
    "op", ["paged_attention", "store_kv", "copy_blocks", "swap_blocks", "rms_norm", "rotary", "silu_and_mul"]
)
def test_without_a_gpu_each_operation_has_a_reason_why_not(op: str) -> None:
    for device in (CPU, torch.device("cuda", 0)):
        assert REGISTRY.reasons(op, device, torch.float16)["cuda"]


def test_the_operations_name_the_device_they_need() -> None:
    inputs = paged_inputs(PagedCase(name="", query_lens=(1,), context_lens=(3,))).to(torch.float16)
    with pytest.raises(UnsupportedError, match=r"paged_attention can't run on cpu .* cuda: needs a CUDA device, not cpu"):
        paged_attention(
            inputs.q,
            inputs.k_cache,
            inputs.v_cache,
            inputs.block_tables,
            inputs.seq_lens,
            inputs.query_start_loc,
            implementation="cuda",
        )


def test_the_backend_gives_every_reason_at_once() -> None:
    class Spec:
        device, dtype, head_size, block_size = CPU, torch.float32, 72, 24

    found = "; ".join(CudaAttention.supports(Spec))
    for expected in ("not cpu", "neither float16 nor bfloat16", "head size 72", "block size 24"):
        assert expected in found
