"""Every Triton kernel against the reference in float64, over the awkward cases that all implementations share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch

import cacheflow_kernels as kernels
from cacheflow_kernels.accuracy import LIMITS, PAGED_CASES, ROW_SHAPES, PagedCase, PagedInputs, paged_inputs, relative_rms, rows
from cacheflow_kernels.triton import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] if is_interpreted() else [torch.float32, torch.float16, torch.bfloat16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cases = pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name.replace(" ", "-"))


def attend(case: PagedCase, inputs: PagedInputs, implementation: str) -> torch.Tensor:
    return kernels.paged_attention(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        inputs.block_tables,
        inputs.seq_lens,
        inputs.query_start_loc,
        window=case.window,
        alibi_slopes=inputs.alibi_slopes,
        soft_cap=case.soft_cap,
        implementation=implementation,
    )


@cases
@dtypes
def test_attention_stays_within_its_limit(case: PagedCase, dtype: torch.dtype) -> None:
    narrow = paged_inputs(case, device=DEVICE).to(dtype)
    expected = attend(case, narrow.to(torch.float64), "reference")
    assert relative_rms(attend(case, narrow, "triton"), expected) <= LIMITS[dtype]


@pytest.mark.parametrize(
    "case",
    [
        PagedCase(name="decodes over several splits", query_lens=(1, 1, 1, 1), context_lens=(700, 0, 255, 256)),
        PagedCase(name="chunks over several tiles", query_lens=(150, 1, 129), context_lens=(3, 20, 70), head_size=32),
        PagedCase(name="a window over several tiles", query_lens=(1, 200), context_lens=(600, 100), head_size=32, window=90),
    ],
    ids=lambda case: case.name.replace(" ", "-"),
)
def test_a_sequence_gets_the_same_bits_whatever_else_is_in_the_batch(case: PagedCase) -> None:
    inputs = paged_inputs(case, device=DEVICE).to(torch.float16)
    together = attend(case, inputs, "triton")
    assert relative_rms(together, attend(case, inputs.to(torch.float64), "reference")) <= LIMITS[torch.float16]
    for i, (start, stop) in enumerate(pairwise(inputs.query_start_loc.tolist())):
        alone = PagedInputs(
            q=inputs.q[start:stop],
            k_cache=inputs.k_cache,
            v_cache=inputs.v_cache,
            block_tables=inputs.block_tables[i : i + 1, : -(-int(inputs.seq_lens[i]) // case.block_size)],
            seq_lens=inputs.seq_lens[i : i + 1],
            query_start_loc=torch.tensor([0, stop - start], dtype=torch.int32, device=DEVICE),
            alibi_slopes=None,
        )
        assert torch.equal(attend(case, alone, "triton"), together[start:stop])


def test_query_rows_and_caches_may_be_strided() -> None:
    case = PagedCase(name="", query_lens=(1, 5), context_lens=(20, 4))
    inputs = paged_inputs(case, device=DEVICE).to(torch.float16)
    both = torch.stack((inputs.k_cache, inputs.v_cache), dim=1)
    strided = PagedInputs(
        q=torch.cat((inputs.q, inputs.q), dim=1)[:, : case.num_heads],
        k_cache=both[:, 0],
        v_cache=both[:, 1],
        block_tables=inputs.block_tables,
        seq_lens=inputs.seq_lens,
        query_start_loc=inputs.query_start_loc,
        alibi_slopes=None,
    )
    assert torch.equal(attend(case, strided, "triton"), attend(case, inputs, "triton"))


def test_a_head_that_fits_no_tile_is_refused() -> None:
    case = PagedCase(name="", query_lens=(1,), context_lens=(0,), head_size=320)
    with pytest.raises(ValueError, match="^head_size must be at most 256"):
        attend(case, paged_inputs(case, device=DEVICE).to(torch.float16), "triton")


@dtypes
def test_keys_and_values_are_stored_where_the_reference_stores_them(dtype: torch.dtype) -> None:
    k, v, _ = torch.randn(5, 3 + 3 + 1, 24, device=DEVICE).to(dtype).split([3, 3, 1], dim=1)
    slots = torch.tensor([9, -1, 0, 14, 7], device=DEVICE)
    stored = []
    for implementation in ("triton", "reference"):
        caches = torch.zeros(3, 2, 3, 5, 24, dtype=dtype, device=DEVICE)
        kernels.store_kv(k, v, caches[:, 0], caches[:, 1], slots, implementation=implementation)
        stored.append(caches)
    assert torch.equal(*stored)


@pytest.mark.parametrize("shape", [(6, 2, 3, 4, 80), (6, 3), (6, 1, 2, 16, 128)], ids=str)
def test_blocks_are_read_before_any_is_written(shape: tuple[int, ...]) -> None:
    pairs = torch.tensor([[0, 1], [1, 2], [5, 0]])
    results = []
    for implementation in ("triton", "reference"):
        generator = torch.Generator().manual_seed(0)
        caches = [torch.randn(shape, generator=generator).half().to(DEVICE) for _ in range(3)]
        kernels.copy_blocks(caches, pairs, implementation=implementation)
        results.append(torch.stack(caches))
    assert torch.equal(*results)


def test_caches_that_one_launch_cannot_serve_are_refused() -> None:
    caches = [torch.zeros(2, 8, device=DEVICE), torch.zeros(2, 9, device=DEVICE)]
    with pytest.raises(ValueError, match="^caches must be alike"):
        kernels.copy_blocks(caches, torch.tensor([[0, 1]]), implementation="triton")


def row_cases(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows as they come, then a weight and a bias for them."""
    generator = torch.Generator().manual_seed(1)
    for x in rows(shape, device=DEVICE):
        weight, bias = (torch.randn(shape[-1], generator=generator).to(device=DEVICE, dtype=dtype) for _ in range(2))
        yield x.to(dtype), weight, bias


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@dtypes
def test_norms_stay_within_their_limits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x, weight, bias in row_cases(shape, dtype):
        wide, wide_weight, wide_bias = x.double(), weight.double(), bias.double()
        out = kernels.rms_norm(x, weight, implementation="triton")
        assert relative_rms(out, kernels.rms_norm(wide, wide_weight, implementation="reference")) <= LIMITS[dtype]
        for offset, wide_offset in ((bias, wide_bias), (None, None)):
            out = kernels.layer_norm(x, weight, offset, implementation="triton")
            expected = kernels.layer_norm(wide, wide_weight, wide_offset, implementation="reference")
            assert relative_rms(out, expected) <= LIMITS[dtype]


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@dtypes
def test_a_fused_norm_is_the_norm_of_the_rounded_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x, weight, _ in row_cases(shape, dtype):
        residual = x.flip(0)
        out, total = kernels.fused_add_rms_norm(x, residual, weight, implementation="triton")
        assert torch.equal(total, x + residual)
        assert torch.equal(out, kernels.rms_norm(total, weight, implementation="triton"))


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@dtypes
def test_gated_activations_stay_within_their_limits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    activations = (
        kernels.silu_and_mul,
        partial(kernels.gelu_and_mul, approximate="none"),
        partial(kernels.gelu_and_mul, approximate="tanh"),
    )
    for x, _, _ in row_cases(shape, dtype):
        for activation in activations:
            expected = activation(x.double(), implementation="reference")
            assert relative_rms(activation(x, implementation="triton"), expected) <= LIMITS[dtype]


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("head_size", "rotary_size"), [(64, 64), (80, 20), (6, 4)])
@dtypes
def test_rotary_stays_within_its_limit(is_neox: bool, head_size: int, rotary_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    angles = torch.outer(torch.arange(50.0), 10.0 ** -torch.linspace(0, 3, rotary_size // 2))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(DEVICE)
    wide = torch.randn(7, 8 * head_size, generator=generator).to(device=DEVICE, dtype=dtype)
    q, k, _ = wide.split([3 * head_size, 2 * head_size, 3 * head_size], dim=1)
    positions = torch.arange(7, device=DEVICE) * 8
    out = kernels.rotary(q, k, positions, cos_sin, head_size, is_neox, implementation="triton")
    expected = kernels.rotary(
        q.double(), k.double(), positions, cos_sin.double(), head_size, is_neox, implementation="reference"
    )
    for turned, wanted in zip(out, expected, strict=True):
        assert relative_rms(turned, wanted) <= LIMITS[dtype]


def test_nothing_in_gives_nothing_out() -> None:
    x = torch.zeros(0, 64, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(64, dtype=torch.float16, device=DEVICE)
    assert kernels.rms_norm(x, weight, implementation="triton").shape == (0, 64)
    assert kernels.layer_norm(x, weight, implementation="triton").shape == (0, 64)
    assert kernels.silu_and_mul(x, implementation="triton").shape == (0, 32)
