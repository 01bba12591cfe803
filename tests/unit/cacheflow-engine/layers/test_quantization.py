"""Quantised matrices: what comes back exactly, how much is lost, and that raw weights are let go as they are packed."""

from __future__ import annotations

import gc
import weakref

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from cacheflow.interfaces import OpSpec
from cacheflow.layers import BuildContext
from cacheflow.layers.quantization import (
    FORMS,
    dequantise_groups,
    quantise_groups,
    quantise_rows,
    quantised_linear,
    rotate_blocks,
)
from cacheflow.layers.torch_ops import TorchOps

CPU = torch.device("cpu")
F32 = torch.float32


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "form"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")])
def test_what_a_gguf_file_holds_comes_back_bit_for_bit(kind: str, form: str) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    # Rows of very different sizes, as scales are small numbers in float16.
    weight = (random(64, 96) * torch.logspace(-3, 1, 64)[:, None]).numpy().astype(np.float32)
    stored = torch.from_numpy(dequantize(quantize(weight, quantisation), quantisation))
    assert torch.equal(dequantise_groups(*quantise_groups(stored, form)), stored)


@pytest.mark.parametrize(("form", "steps"), [("int8", 127), ("int4", 7)])
def test_no_weight_is_further_away_than_a_step_of_its_group(form: str, steps: int) -> None:
    weight = random(9, 70)
    error = (dequantise_groups(*quantise_groups(weight, form)) - weight).abs()
    largest = torch.nn.functional.pad(weight, (0, 26)).unflatten(1, (-1, 32)).abs().amax(dim=2, keepdim=True)
    step = (largest / steps).expand(-1, -1, 32).flatten(1)[:, :70]
    assert bool((error <= step).all())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_group_of_equal_numbers_or_zeros_is_kept(form: str) -> None:
    weight = torch.cat((torch.zeros(1, 33), torch.full((1, 33), -0.5)))
    torch.testing.assert_close(dequantise_groups(*quantise_groups(weight, form)), weight, rtol=1e-3, atol=0)


def test_products_of_turned_rows_are_what_they_were() -> None:
    x, weight = random(5, 150), random(7, 150, seed=1)
    torch.testing.assert_close(rotate_blocks(x) @ rotate_blocks(weight).T, x @ weight.T)


def test_turning_spreads_what_stands_out_so_that_bytes_lose_less() -> None:
    x, weight = random(16, 576), random(64, 576, seed=1)
    x[:, 100] *= 100
    weight[:, 100] /= 100

    def error(y: torch.Tensor) -> float:
        exact = x.double() @ weight.double().T
        return float((y - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    whole, scales = quantise_rows(x)
    straight = (whole.float() * scales[:, None]) @ weight.T
    assert error(quantised_linear(weight, None, "int8_dynamic", F32)(x)) < error(straight) / 3


@pytest.mark.parametrize("form", ["int8", "int4", "int8_dynamic"])
def test_a_quantised_weight_takes_a_byte_and_the_raw_one_is_let_go(form: str) -> None:
    weight = random(64, 96)
    product = quantised_linear(weight, None, form, torch.bfloat16)
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None
    assert product(torch.ones(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", list(FORMS))
def test_a_matrix_is_packed_and_let_go_as_soon_as_it_is_whole(quantization: str) -> None:
    context = BuildContext(TorchOps(OpSpec(dtype=F32, device=CPU)), F32, CPU, forms=FORMS[quantization])
    first = context.linear(["q", "k"], 64, [32, 32])
    context.linear("other", 64, 8)
    raw = weakref.ref(context.parameter("q.weight"))
    context.load("q.weight", torch.ones(32, 64))
    assert raw() is not None
    context.load("k.weight", torch.ones(32, 64))
    gc.collect()
    assert raw() is None
    torch.testing.assert_close(first(torch.ones(1, 64)), torch.full((1, 64), 64.0), rtol=1e-2, atol=0)
