"""The operations on rows against torch's own modules, in float64, and in each narrow dtype against that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from cacheflow_kernels import (
    fused_add_rms_norm,
    gelu_and_mul,
    layer_norm,
    rms_norm,
    rotary,
    row_maxima,
    silu_and_mul,
)
from cacheflow_kernels.accuracy import LIMITS, ROW_SHAPES, relative_rms, rows

shapes = pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def weight_of(size: int) -> torch.Tensor:
    return 1 + 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check(ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> None:
    assert relative_rms(ours(*arguments), theirs(*arguments)) <= LIMITS[torch.float64]


@shapes
def test_rms_norm_equals_torchs(shape: tuple[int, ...]) -> None:
    for x in rows(shape):
        check(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: functional.rms_norm(x, w.shape, w, 1e-6), x, weight_of(shape[-1]))


@shapes
def test_layer_norm_equals_torchs_with_and_without_a_bias(shape: tuple[int, ...]) -> None:
    weight, bias = weight_of(shape[-1]), weight_of(shape[-1]) - 1
    for x in rows(shape):
        check(lambda x, w, b: layer_norm(x, w, b), lambda x, w, b: functional.layer_norm(x, w.shape, w, b), x, weight, bias)
        check(lambda x, w: layer_norm(x, w), lambda x, w: functional.layer_norm(x, w.shape, w), x, weight)


@shapes
def test_fused_add_rms_norm_is_the_sum_and_its_norm(shape: tuple[int, ...]) -> None:
    x, residual = (next(rows(shape, seed)) for seed in (0, 1))
    normed, total = fused_add_rms_norm(x.clone(), residual.clone(), weight_of(shape[-1]))
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight_of(shape[-1])))


@shapes
def test_gated_activations_take_the_first_half_as_gate(shape: tuple[int, ...]) -> None:
    for x in rows(shape):
        gate, up = x.split(shape[-1] // 2, dim=-1)
        assert relative_rms(silu_and_mul(x), functional.silu(gate) * up) <= LIMITS[torch.float64]
        for kind in ("none", "tanh"):
            expected = functional.gelu(gate, approximate=kind) * up
            assert relative_rms(gelu_and_mul(x, approximate=kind), expected) <= LIMITS[torch.float64]


@shapes
@dtypes
def test_row_operations_in_a_narrow_dtype_stay_within_its_limit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weight_of(shape[-1])
    for x in rows(shape):
        narrow = x.to(dtype)
        exact = narrow.double()
        narrow_weight = weight.to(dtype)
        exact_weight = narrow_weight.double()
        for out, expected in (
            (rms_norm(narrow, narrow_weight), rms_norm(exact, exact_weight)),
            (layer_norm(narrow, narrow_weight), layer_norm(exact, exact_weight)),
            (silu_and_mul(narrow), silu_and_mul(exact)),
            (gelu_and_mul(narrow), gelu_and_mul(exact)),
        ):
            assert out.dtype == dtype
            assert relative_rms(out, expected) <= LIMITS[dtype]


def cos_sin_table(rotary_size: int, num_positions: int = 64) -> torch.Tensor:
    frequencies = 10_000.0 ** (-torch.arange(0, rotary_size, 2, dtype=torch.float64) / rotary_size)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("head_size", "rotary_size"), [(64, 64), (80, 32), (6, 2)])
def test_rotary_turns_each_pair_as_a_complex_number(is_neox: bool, head_size: int, rotary_size: int) -> None:
    positions = torch.tensor([0, 5, 63, 5, 17])
    table = cos_sin_table(rotary_size)
    q, k = torch.randn(5, 3 * head_size, dtype=torch.float64), torch.randn(5, head_size, dtype=torch.float64)
    half = rotary_size // 2
    turn = torch.complex(table[positions, :half], table[positions, half:])[:, None]
    for x, out in zip((q, k), rotary(q.clone(), k.clone(), positions, table, head_size, is_neox), strict=True):
        heads, turned = x.unflatten(-1, (-1, head_size)), out.unflatten(-1, (-1, head_size))
        pairs = (slice(0, half), slice(half, rotary_size)) if is_neox else (slice(0, rotary_size, 2), slice(1, rotary_size, 2))
        expected = torch.complex(heads[..., pairs[0]], heads[..., pairs[1]]) * turn
        assert relative_rms(turned[..., pairs[0]], expected.real) <= LIMITS[torch.float64]
        assert relative_rms(turned[..., pairs[1]], expected.imag) <= LIMITS[torch.float64]
        assert torch.equal(turned[..., rotary_size:], heads[..., rotary_size:])


@dtypes
def test_rotary_in_a_narrow_dtype_stays_within_its_limit_on_strided_rows(dtype: torch.dtype) -> None:
    qkv = torch.randn(7, 5 * 64, dtype=torch.float64).to(dtype)
    q, k = qkv[:, : 3 * 64], qkv[:, 3 * 64 : 4 * 64]
    positions, table = torch.arange(7) * 9, cos_sin_table(64)
    exact = rotary(q.double(), k.double(), positions, table, 64)
    for out, expected in zip(rotary(q, k, positions, table.float(), 64), exact, strict=True):
        assert out.dtype == dtype
        assert relative_rms(out, expected) <= LIMITS[dtype]


def test_a_weight_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"^weight must be \[8\]"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7))


@dtypes
@pytest.mark.parametrize("size", [1, 7, 16, 1003, 40_000])
def test_row_maxima_are_torchs_and_of_equals_the_first(implementation: str, dtype: torch.dtype, size: int) -> None:
    # Few different numbers, so that the largest is there more than once.
    x = (torch.randn(3, size + 5, generator=torch.Generator().manual_seed(2)) * 3).round().to(dtype)[:, 2 : size + 2]
    values, indices, normalisers = row_maxima(x, implementation=implementation)
    largest = x.float().amax(dim=1)
    assert torch.equal(values, largest)
    assert indices.tolist() == [row.tolist().index(value) for row, value in zip(x.float(), largest.tolist(), strict=True)]
    torch.testing.assert_close(normalisers, x.double().logsumexp(dim=1).float(), rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_numbers_has_a_normaliser_that_is_not_finite(implementation: str) -> None:
    x = torch.zeros(4, 50)
    x[0, 49], x[1, 3], x[2] = float("nan"), float("inf"), float("-inf")
    x[3, 1:] = float("-inf")
    _, indices, normalisers = row_maxima(x, implementation=implementation)
    assert normalisers.isfinite().tolist() == [False, False, False, True]
    assert indices[3] == 0
    assert normalisers[3] == 0
