"""Packed linear: every form at every level of instruction sets that this machine has, against float64."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cacheflow_kernels import linear, reference
from cacheflow_kernels.accuracy import LIMITS, relative_rms
from cacheflow_kernels.cpu import library
from cacheflow_kernels.cpu.linear import linear as cpu_linear

SHAPES = ((1, 1), (50, 37), (64, 128), (98, 130), (200, 576))
"""out_features, in_features: whole panels, and outputs that are no multiple of 32 with odd inputs."""
ROWS = (*range(1, 14), 17, 32, 33, 47, 64, 100)
QUANTISED = ("int8", "int4", "int8_dynamic")


def levels() -> list[str]:
    loaded = library.load()
    return [] if loaded is None else list(library.LEVELS[1 : int(loaded.cf_machine_level()) + 1])


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
needs_library = pytest.mark.skipif(library.load() is None, reason="; ".join(library.reasons()))
pytestmark = needs_library


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    loaded = library.load()
    assert loaded is not None
    before = library.level()
    loaded.cf_set_level(library.LEVELS.index(request.param))
    yield request.param
    loaded.cf_set_level(library.LEVELS.index(before))


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_plain_weight_is_at_most_twice_as_far_from_float64_as_torch_is(
    level: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, bias = random(*shape, dtype=dtype), random(shape[0], dtype=dtype, seed=1)
    for offset in (bias, None):
        multiply = linear(weight, offset, implementation="cpu")
        x = torch.cat([random(rows, shape[1], dtype=dtype, seed=rows) for rows in ROWS])
        exact = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
        torchs = relative_rms(functional.linear(x, weight, offset), exact)
        out = torch.cat([multiply(part) for part in x.split(ROWS)])
        assert out.dtype == dtype
        assert relative_rms(out, exact) <= max(2 * torchs, LIMITS[dtype] / 2)


@dtypes
def test_the_fused_activation_is_at_most_twice_as_far_from_float64_as_torch_is(level: str, dtype: torch.dtype) -> None:
    weight, bias, x = random(98, 130, dtype=dtype), random(98, dtype=dtype, seed=1), random(29, 130, dtype=dtype, seed=2)
    both = functional.linear(x, weight, bias)
    torchs = functional.silu(both[:, :49]) * both[:, 49:]
    both = functional.linear(x.double(), weight.double(), bias.double())
    exact = functional.silu(both[:, :49]) * both[:, 49:]
    out = linear(weight, bias, is_gated=True, implementation="cpu")(x)
    assert relative_rms(out, exact) <= max(2 * relative_rms(torchs, exact), LIMITS[dtype] / 2)


@dtypes
@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("group_size", [32, 96, 160])
def test_a_quantised_weight_multiplies_like_the_reference(level: str, dtype: torch.dtype, form: str, group_size: int) -> None:
    # Where a sum of products lies between two bytes or two bfloat16 numbers, either is right.
    limit = 1e-3 if dtype == torch.float32 else 5e-3
    for num_rows, size in SHAPES[1:]:
        weight, bias, x = (random(*s, dtype=dtype) for s in ((num_rows, size), (num_rows,), (29, size)))
        out = linear(weight, bias, form=form, group_size=group_size, implementation="cpu")(x)
        expected = reference.linear(weight.float(), bias.float(), form, group_size, False)(x.float())
        assert relative_rms(out, expected) <= limit, (num_rows, size)


@pytest.mark.parametrize(("form", "limit"), [("int8", 0.01), ("int8_dynamic", 0.02), ("int4", 0.15)])
def test_quantising_loses_little(form: str, limit: float) -> None:
    weight, x = random(96, 256, dtype=torch.bfloat16), random(16, 256, dtype=torch.bfloat16, seed=1)
    exact = functional.linear(x.double(), weight.double())
    assert relative_rms(linear(weight, form=form)(x), exact) <= limit


@dtypes
@pytest.mark.parametrize("form", ["plain", *QUANTISED])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_row_is_the_same_bit_for_bit_whatever_else_is_in_the_batch(
    level: str, dtype: torch.dtype, form: str, is_gated: bool
) -> None:
    multiply = linear(random(98, 130, dtype=dtype), form=form, is_gated=is_gated, implementation="cpu")
    x = random(100, 130, dtype=dtype)
    whole = multiply(x)
    for rows in ROWS:
        for start in (0, 100 - rows):
            assert torch.equal(multiply(x[start : start + rows]), whole[start : start + rows]), rows


@pytest.mark.parametrize("form", ["plain", "int8_dynamic"])
@pytest.mark.parametrize(("in_features", "num_rows"), [(40, 901), (1216, 850), (8200, 290)])
@pytest.mark.parametrize("is_gated", [False, True])
def test_rows_so_many_that_they_come_in_blocks_and_along_k_in_parts_keep_their_bits(
    level: str, form: str, in_features: int, num_rows: int, is_gated: bool
) -> None:
    weight, bias = (random(*shape, dtype=torch.bfloat16) for shape in ((70, in_features), (70,)))
    multiply = linear(weight, bias, form=form, is_gated=is_gated, implementation="cpu")
    wide = random(num_rows, in_features + 3, dtype=torch.bfloat16, seed=1)
    x = wide[:, 2:-1]
    whole = multiply(x)
    for start in range(0, num_rows, 210):
        for size in (23, 41, 64):
            part = x[start : start + size]
            assert torch.equal(multiply(part), whole[start : start + size]), (start, size)


@dtypes
@pytest.mark.parametrize("form", ["plain", *QUANTISED])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, form: str) -> None:
    multiply, x = linear(random(640, 576, dtype=dtype), form=form, implementation="cpu"), random(30, 576, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(multiply(x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@dtypes
def test_rows_may_be_strided_and_none_at_all(level: str, dtype: torch.dtype) -> None:
    multiply, wide = linear(random(40, 37, dtype=dtype), implementation="cpu"), random(9, 50, dtype=dtype)
    assert torch.equal(multiply(wide[:, 3:40]), multiply(wide[:, 3:40].contiguous()))
    assert multiply(wide[:0, :37]).shape == (0, 40)


@dtypes
@pytest.mark.parametrize("form", ["plain", "int8_dynamic"])
def test_a_row_with_a_nan_stays_alone_with_it(level: str, dtype: torch.dtype, form: str) -> None:
    multiply, x = linear(random(40, 37, dtype=dtype), form=form, implementation="cpu"), random(5, 37, dtype=dtype)
    x[2, 36] = float("nan")
    out = multiply(x)
    assert out[2].isnan().all()
    assert not out[[0, 1, 3, 4]].isnan().any()


def test_a_row_of_zeros_gives_the_bias(level: str) -> None:
    bias = random(40, dtype=torch.float32)
    for form in ("plain", *QUANTISED):
        assert torch.equal(linear(random(40, 37, dtype=torch.float32), bias, form=form)(torch.zeros(1, 37))[0], bias)


@pytest.mark.parametrize("form", ["plain", *QUANTISED])
def test_the_unpacked_weight_is_let_go(form: str) -> None:
    weight = random(64, 64, dtype=torch.bfloat16)
    multiply = linear(weight, form=form, implementation="cpu")
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None
    assert multiply(torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_bad_arguments_are_refused_by_name(implementation: str) -> None:
    weight = torch.zeros(6, 8)
    for arguments, message in (
        ({"weight": weight[0]}, "weight must be"),
        ({"weight": weight, "bias": torch.zeros(5)}, "bias must be"),
        ({"weight": weight, "bias": torch.zeros(6, dtype=torch.bfloat16)}, "bias must be"),
        ({"weight": weight, "form": "int3"}, "form must be one of"),
        ({"weight": weight, "form": "int8", "group_size": 48}, "group_size must be"),
        ({"weight": weight[:5], "is_gated": True}, "is_gated needs"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(**arguments, implementation=implementation)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 9),
        torch.zeros(8),
        torch.zeros(2, 8, dtype=torch.bfloat16),
        torch.zeros(8, 2).T,
        torch.zeros(2, 8, device="meta"),
    ],
    ids=["size", "axes", "dtype", "stride", "device"],
)
def test_bad_rows_are_refused_by_name(x: Tensor) -> None:
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.zeros(6, 8), implementation="cpu")(x)


@pytest.mark.parametrize("wanted", [*levels(), "sse9"])
def test_the_environment_chooses_the_level(wanted: str) -> None:
    program = "from cacheflow_kernels.cpu import library; print(library.level())"
    environment = os.environ | {"CACHEFLOW_CPU_LEVEL": wanted}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    if wanted == "sse9":
        assert "Usable levels: avx2" in result.stderr
    else:
        assert result.stdout.strip() == wanted


@pytest.mark.parametrize("form", QUANTISED)
def test_a_float32_weight_may_be_quantised_for_bfloat16_rows(level: str, form: str) -> None:
    weight, x = random(96, 130, dtype=torch.float32), random(9, 130, dtype=torch.bfloat16, seed=1)
    out = cpu_linear(weight, None, form, 32, False, torch.bfloat16)(x)
    expected = reference.linear(weight, None, form, 32, False)(x.float())
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, expected) <= 5e-3


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("rows", [1, 8, 12, 13, 16, 17, 33])
def test_rows_are_read_in_place_or_copied_with_the_same_result(level: str, form: str, rows: int) -> None:
    multiply, x = linear(random(64, 64, dtype=torch.bfloat16), form=form), random(rows, 96, dtype=torch.bfloat16)
    assert torch.equal(multiply(x[:, :64]), multiply(x[:, :64].contiguous()))


@pytest.mark.parametrize("is_gated", [False, True])
def test_rows_that_do_not_fit_the_cache_give_what_they_give_alone(level: str, is_gated: bool) -> None:
    multiply = linear(random(64, 4096, dtype=torch.bfloat16), is_gated=is_gated, implementation="cpu")
    x = random(233, 4096, dtype=torch.bfloat16)
    whole = multiply(x)
    for start, end in ((0, 1), (90, 110), (90, 123), (95, 233), (232, 233)):
        assert torch.equal(multiply(x[start:end]), whole[start:end])


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e30])
def test_a_row_alone_is_the_same_bit_for_bit_however_large_its_numbers(level: str, form: str, scale: float) -> None:
    multiply = linear(random(256, 320, dtype=torch.bfloat16), form=form, group_size=64, implementation="cpu")
    x = (random(40, 320, dtype=torch.float32, seed=1) * scale).bfloat16()
    whole = multiply(x)
    for row in range(40):
        assert torch.equal(multiply(x[row : row + 1])[0], whole[row])
