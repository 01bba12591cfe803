"""The CUDA sources, compiled by g++ with emulated threads and tensor cores, give what the reference gives.

What only hardware shows (races, speed, the instructions themselves) is left to `tests/kernels/gpu`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cacheflow_kernels import paged_attention, reference
from cacheflow_kernels.accuracy import (
    LIMITS,
    PAGED_CASES,
    ROW_SHAPES,
    PagedCase,
    PagedInputs,
    paged_inputs,
    relative_rms,
    rows,
)
from cacheflow_kernels.attention import CudaAttention
from cacheflow_kernels.cuda import attention, blocks, library
from cacheflow_kernels.cuda import rows as cuda_rows

SOURCES = Path(library.__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the CUDA sources for the CPU with")

PAGED_DTYPES = pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
ROW_DTYPES = pytest.mark.parametrize("dtype", library.DTYPES, ids=str)
SPLIT = 512
"""Positions of one split."""


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cuda")
    for source in SOURCES.glob("*.cu"):
        shutil.copy(source, folder)
    shutil.copy(Path(__file__).parent / "cuda_emulation" / "primitives.h", folder)
    sources = sorted(map(str, folder.glob("*.cu")))
    command = ["g++", "-x", "c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(folder / "_cuda.so"), *sources]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "PATH", folder / "_cuda.so")
        patch.setattr(library, "place", lambda tensor: (0, 0))
        _forget_library()
        yield
    _forget_library()


def _forget_library() -> None:
    library.load.cache_clear()
    library.reasons.cache_clear()
    library._symbol.cache_clear()


def decode(case: PagedCase, inputs: PagedInputs) -> Tensor:
    """The kernel's result; NaN in rows that it leaves to others."""
    out = torch.full_like(inputs.q, float("nan"))
    num_seqs, max_seq_len = len(inputs.seq_lens), int(inputs.seq_lens.max())
    workspace = attention.Workspace.make(num_seqs, case.num_heads, case.head_size, max_seq_len, inputs.q.device)
    attention.paged_decode(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        inputs.block_tables,
        inputs.seq_lens,
        inputs.query_start_loc,
        out,
        case.head_size**-0.5,
        case.window,
        inputs.alibi_slopes,
        case.soft_cap,
        workspace,
    )
    return out


def is_decode(case: PagedCase) -> Tensor:
    """By row, whether its sequence has no other."""
    lens = torch.tensor(case.query_lens)
    return (lens == 1).repeat_interleave(lens)


SHAPES = (
    *PAGED_CASES,
    PagedCase(name="exactly one split", query_lens=(1, 1), context_lens=(SPLIT - 1, SPLIT)),
    PagedCase(name="a window over three splits", query_lens=(1,), context_lens=(3 * SPLIT - 100,), window=SPLIT + 10),
    PagedCase(name="a window behind whole splits", query_lens=(1, 1), context_lens=(3 * SPLIT, 5), window=40),
    PagedCase(name="20 heads over one", query_lens=(1,), context_lens=(600,), num_heads=20, num_kv_heads=1, head_size=32),
    *(
        PagedCase(
            name=f"head size {size}, block size {block}", query_lens=(1,), context_lens=(77,), head_size=size, block_size=block
        )
        for size, block in zip(attention.HEAD_SIZES, (8, 16, 32, 8, 32, 8, 16, 32), strict=True)
    ),
)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name.replace(" ", "-"))
@PAGED_DTYPES
def test_decodes_stay_within_the_limit_and_other_rows_are_left_alone(case: PagedCase, dtype: torch.dtype) -> None:
    inputs = paged_inputs(case).to(dtype)
    out, decodes = decode(case, inputs), is_decode(case)
    wide = inputs.to(torch.float64)
    expected = paged_attention(
        wide.q,
        wide.k_cache,
        wide.v_cache,
        wide.block_tables,
        wide.seq_lens,
        wide.query_start_loc,
        window=case.window,
        alibi_slopes=wide.alibi_slopes,
        soft_cap=case.soft_cap,
        implementation="reference",
    )
    if decodes.any():
        assert relative_rms(out[decodes], expected[decodes]) <= LIMITS[dtype]
    assert out[~decodes].isnan().all()


def test_a_decode_gets_the_same_bits_whatever_else_is_in_the_batch() -> None:
    case = PagedCase(name="", query_lens=(1, 1, 2, 1), context_lens=(1100, 3, 20, 515))
    inputs = paged_inputs(case).to(torch.bfloat16)
    together = decode(case, inputs)
    for i in (0, 1, 3):
        row = int(inputs.query_start_loc[i])
        alone = PagedInputs(
            q=inputs.q[row : row + 1],
            k_cache=inputs.k_cache,
            v_cache=inputs.v_cache,
            block_tables=inputs.block_tables[i : i + 1],
            seq_lens=inputs.seq_lens[i : i + 1],
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
            alibi_slopes=None,
        )
        assert torch.equal(decode(case, alone), together[row : row + 1])


def test_strided_heads_give_what_contiguous_ones_give() -> None:
    case = PagedCase(name="", query_lens=(1, 1), context_lens=(30, 7))
    inputs = paged_inputs(case).to(torch.float16)
    gaps = inputs.q.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(decode(case, PagedInputs(**(vars(inputs) | {"q": gaps}))), decode(case, inputs))


def test_a_sequence_without_positions_gets_zeros() -> None:
    case = PagedCase(name="", query_lens=(1,), context_lens=(0,))
    inputs = paged_inputs(case).to(torch.float16)
    inputs.seq_lens[0] = 0
    assert not decode(case, inputs).any()


@pytest.mark.parametrize("head_size", [16, 20], ids=["wide", "narrow"])
def test_stored_rows_arrive_at_their_slots_and_nowhere_else(head_size: int) -> None:
    qkv = torch.randn(4, 3, 2, head_size).half()
    k, v = qkv[:, 1], qkv[:, 2]
    slots = torch.tensor([9, -1, 0, 7])
    caches = [torch.zeros(3, 2, 4, head_size).half() for _ in range(4)]
    blocks.store_kv(k, v, *caches[:2], slots)
    reference.store_kv(k, v, *caches[2:], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("pairs", [[(0, 3), (1, 2)], [(0, 1), (1, 2)], []], ids=["apart", "a chain", "none"])
def test_copied_blocks_are_read_before_any_is_written(pairs: list[tuple[int, int]]) -> None:
    tensor = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    caches = [torch.randn(4, 2, 8) for _ in range(130)]
    expected = [cache.clone() for cache in caches]
    blocks.copy_blocks(caches, tensor)
    reference.copy_blocks(expected, tensor)
    assert all(torch.equal(*both) for both in zip(caches, expected, strict=True))


def test_swapped_blocks_arrive_singly_and_in_runs() -> None:
    source, destination = torch.randn(6, 2, 8), torch.zeros(8, 2, 8)
    expected = destination.clone()
    pairs = torch.tensor([[3, 0], [4, 1], [5, 2], [0, 7]])
    blocks.swap_blocks(source, destination, pairs)
    reference.swap_blocks(source, expected, pairs)
    assert torch.equal(destination, expected)


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@ROW_DTYPES
def test_rows_are_normalised(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in rows(shape):
        x, weight = x.to(dtype), (1 + torch.rand(shape[-1])).to(dtype)
        residual = torch.randn(shape).to(dtype)
        expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
        assert relative_rms(cuda_rows.rms_norm(x, weight, 1e-6), expected) <= LIMITS[dtype]
        out, total = cuda_rows.fused_add_rms_norm(x, residual.clone(), weight, 1e-6)
        assert torch.equal(total, x + residual)
        assert relative_rms(out, reference.rms_norm(total.double(), weight.double(), 1e-6)) <= LIMITS[dtype]


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@ROW_DTYPES
def test_gated_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in rows(shape):
        x = x.to(dtype)
        assert relative_rms(cuda_rows.silu_and_mul(x), reference.silu_and_mul(x.double())) <= LIMITS[dtype]
        for approximate in ("none", "tanh"):
            expected = reference.gelu_and_mul(x.double(), approximate)
            assert relative_rms(cuda_rows.gelu_and_mul(x, approximate), expected) <= LIMITS[dtype]


@pytest.mark.parametrize(("rotary_size", "is_neox"), [(64, True), (64, False), (32, True), (20, False)])
@ROW_DTYPES
def test_heads_are_turned(rotary_size: int, is_neox: bool, dtype: torch.dtype) -> None:
    qkv = torch.randn(5, 8 * 64, dtype=torch.float64).to(dtype)
    q, k = qkv[:, : 6 * 64], qkv[:, 6 * 64 :]
    angles = torch.arange(100)[:, None] / 10 ** torch.linspace(0, 3, rotary_size // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([0, 99, 3, 3, 50])
    expected = reference.rotary(q.double(), k.double(), positions, cos_sin.double(), 64, is_neox)
    out = cuda_rows.rotary(q, k, positions, cos_sin, 64, is_neox)
    for found, wanted in zip(out, expected, strict=True):
        assert relative_rms(found, wanted) <= LIMITS[dtype]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.zeros(1, 4, 72).half()}),
        ("q", {"q": torch.zeros(1, 4, 64)}),
        ("k_cache", {"k_cache": torch.zeros(5, 2, 16, 64).bfloat16()}),
        ("v_cache", {"v_cache": torch.zeros(5, 16, 2, 64).half().transpose(1, 2)}),
        ("block_tables", {"block_tables": torch.zeros(8, 2, dtype=torch.int32).T[:1]}),
        ("alibi_slopes", {"alibi_slopes": torch.zeros(4).half()}),
    ],
)
def test_what_the_kernel_can_not_take_is_named(name: str, change: dict[str, Tensor]) -> None:
    case = PagedCase(name="", query_lens=(1,), context_lens=(20,))
    inputs = paged_inputs(case).to(torch.float16)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        decode(case, PagedInputs(**(vars(inputs) | change)))


def test_a_padded_batch_in_a_refilled_plan_gets_the_bits_that_it_gets_alone() -> None:
    layer = SimpleNamespace(scale=0.125, window=None, alibi_slopes=None, soft_cap=None)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 16}
    backend = CudaAttention(SimpleNamespace(**sizes, dtype=torch.float16, device=torch.device("cpu")))

    def decodes(lens: list[int], width: int) -> SimpleNamespace:
        # Each sequence has 40 blocks, of which the table shows as many as it has room for.
        tables = torch.arange(40, dtype=torch.int32) + 40 * torch.arange(len(lens), dtype=torch.int32)[:, None]
        return SimpleNamespace(
            query_start_loc=torch.arange(len(lens) + 1, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_tables=torch.cat((tables, torch.full((len(lens), 64), -1, dtype=torch.int32)), dim=1)[:, :width].contiguous(),
            slot_mapping=torch.tensor([640 * i + length - 1 for i, length in enumerate(lens)]),
            num_decodes=len(lens),
            max_query_len=1,
        )

    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(backend.kv_shape(160), generator=generator).half()
    q, k, v = (torch.randn(4, heads, 64, generator=generator).half() for heads in (4, 2, 2))
    lens = [5, 600, 33]
    kv, kv_padded = cache.clone(), cache.clone()
    alone = backend.forward(layer, q[:3], k[:3], v[:3], kv, backend.plan(decodes(lens, 38)))
    captured = backend.plan(decodes([1, 1, 1, 1], 96))
    padded = backend.plan(decodes([*lens, 1], 96), into=captured)
    assert padded is captured
    assert torch.equal(backend.forward(layer, q, k, v, kv_padded, padded)[:3], alone)
    assert torch.equal(kv_padded[:120], kv[:120])
