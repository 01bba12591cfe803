"""Random draws from rows of logits: what temperature, min_p, top_k and top_p leave, at every level, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cacheflow_kernels import draw_rows
from cacheflow_kernels.cpu import library

EPSILON = 1e-6
"""Sums in float32 may be off in the seventh digit; at a border either neighbour is right."""
BELOW_ONE = 1 - 2**-53
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def numbers_of(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def near(x: Tensor, rows: Tensor, temperatures: Tensor, numbers: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What the reference draws, `[27, num_draws]`, when number, top_p and min_p are a little less, as they are, or more."""
    found = [
        draw_rows(
            *(x, rows, temperatures, (numbers + i * EPSILON).clamp(0, BELOW_ONE), top_k),
            *(torch.where(top_p < 1, (top_p + j * EPSILON).clamp(1e-12, BELOW_ONE), top_p), min_p * (1 + k * EPSILON)),
            implementation="reference",
        )[0]
        for i in (0, -1, 1)
        for j in (0, -1, 1)
        for k in (0, -1, 1)
    ]
    return torch.stack(found)


def rows_of(kind: str, size: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(6, size, generator=generator) * 3
    if kind == "flat":
        return torch.zeros(6, size)
    if kind == "of few values":
        return x.round()
    if kind == "with one huge":
        x[:, size // 2] = 60
    if kind == "around zero":
        x *= 1e-30
        x[:, 0] = 1
    if kind == "with many of no weight":
        x[torch.rand(6, size, generator=generator) < 0.7] = -math.inf
        x[:, -1] = 1
    return x


KINDS = ("random", "flat", "of few values", "with one huge", "around zero", "with many of no weight")


@dtypes
@pytest.mark.parametrize("size", [1, 7, 300, 1003, 5000])
def test_filters_leave_what_they_leave_in_the_reference(implementation: str, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    count = 40
    for kind in KINDS:
        x = rows_of(kind, size, generator).to(dtype)
        rows = torch.randint(0, 6, (count,), generator=generator)
        temperatures, numbers = torch.rand(count, generator=generator) * 2 + 0.1, numbers_of(count, generator)
        # All combinations: each is there or not, by its own bit of the draw's number.
        top_k = torch.randint(1, size + 2, (count,), generator=generator) * (torch.arange(count) & 1)
        top_k[::3] = top_k[::3].clamp(max=50)
        top_p = torch.where(torch.arange(count) & 2 > 0, numbers_of(count, generator).clamp(min=1e-3), 1.0)
        min_p = torch.rand(count, generator=generator) * 0.3 * (torch.arange(count) & 4 > 0)
        arguments = (x, rows, temperatures, numbers, top_k, top_p, min_p)
        tokens, logprobs = draw_rows(*arguments, implementation=implementation)
        differs = tokens != draw_rows(*arguments, implementation="reference")[0]
        if differs.any():
            allowed = near(x, *(argument[differs] for argument in arguments[1:]))
            assert bool((allowed == tokens[differs]).any(dim=0).all()), kind
        expected = x[rows].double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected.float(), rtol=1e-5, atol=1e-5)


@dtypes
@pytest.mark.parametrize("size", [1, 7, 300, 1003, 40_000])
def test_drawn_places_are_where_the_running_sum_passes_the_number(implementation: str, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(3, size + 5, generator=generator) * 3).to(dtype)[:, 2 : size + 2]
    rows = torch.arange(60) % 3
    temperatures = torch.tensor([0.3, 1.0, 2.5]).repeat_interleave(20)
    numbers = numbers_of(60, generator)
    tokens, logprobs = draw_rows(x, rows, temperatures, numbers, implementation=implementation)
    ends = (x[rows].double() / temperatures[:, None].double()).softmax(dim=1).cumsum(dim=1)
    below = torch.where(tokens > 0, ends.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert bool((below <= numbers + EPSILON).all())
    assert bool((ends.gather(1, tokens[:, None])[:, 0] >= numbers - EPSILON).all())
    expected = x[rows].double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-5, atol=1e-5)


def everywhere() -> Iterator[str]:
    """Each implementation in turn, the C++ one at each level that the machine has."""
    loaded = library.load()
    if loaded is not None:
        before = library.level()
        try:
            for level in range(1, int(loaded.cf_machine_level()) + 1):
                loaded.cf_set_level(level)
                yield "cpu"
        finally:
            loaded.cf_set_level(library.LEVELS.index(before))
    yield "reference"


def draw_one(values: list[float], number: float, implementation: str, *, temperature: float = 1.0, **filters: Any) -> int:
    x = torch.tensor([values])
    dtype_of = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float32}
    given_filters = {name: torch.tensor([value], dtype=dtype_of[name]) for name, value in filters.items()}
    tokens, _ = draw_rows(
        *(x, torch.tensor([0]), torch.tensor([temperature]), torch.tensor([number], dtype=torch.float64)),
        **given_filters,
        implementation=implementation,
    )
    return int(tokens)


@settings(max_examples=60)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, -math.inf, -1e4]), min_size=1, max_size=700).filter(lambda row: 0.0 in row),
    top_k=st.integers(-1, 710),
    top_p=st.one_of(st.just(1.0), st.floats(2**-20, 1), st.sampled_from([0.25, 0.5, 0.75])),
    min_p=st.sampled_from([0.0, 0.5, 1.0]),
    number=st.floats(0, BELOW_ONE),
)
@example(values=[0.0] * 4, top_k=-1, top_p=0.5, min_p=0.0, number=BELOW_ONE)
@example(values=[0.0] * 640, top_k=512, top_p=0.5, min_p=0.0, number=BELOW_ONE)
@example(values=[-math.inf] * 300 + [0.0], top_k=200, top_p=0.5, min_p=0.0, number=0.0)
def test_where_all_weights_are_one_or_nothing_the_draw_is_exact(
    values: list[float], top_k: int, top_p: float, min_p: float, number: float
) -> None:
    likely = [place for place, value in enumerate(values) if value == 0]
    # In the order they come before all others, the first first.
    kept = likely[:top_k] if top_k > 0 else likely
    if top_p < 1:
        kept = kept[: next(n for n in range(1, len(kept) + 1) if n >= top_p * len(kept))]
    expected = kept[min(int(number * len(kept)), len(kept) - 1)]
    for implementation in everywhere():
        assert draw_one(values, number, implementation, top_k=top_k, top_p=top_p, min_p=min_p) == expected


@settings(max_examples=60)
@given(
    values=st.lists(st.integers(-40, 40), min_size=1, max_size=400),
    temperature=st.sampled_from([0.05, 0.5, 1.0, 3.0, 50.0]),
    top_k=st.integers(0, 400),
    top_p=st.floats(1e-3, 1),
    min_p=st.floats(0, 1),
    number=st.floats(0, BELOW_ONE),
)
def test_any_row_is_drawn_as_in_the_reference(
    values: list[int], temperature: float, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    x = torch.tensor([values]) / 4
    arguments = (
        *(x, torch.tensor([0]), torch.tensor([temperature]), torch.tensor([number], dtype=torch.float64)),
        *(torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64), torch.tensor([min_p])),
    )
    allowed = near(*arguments)
    for implementation in everywhere():
        tokens, _ = draw_rows(*arguments, implementation=implementation)
        assert bool((allowed == tokens).any())


@dtypes
def test_filters_that_take_nothing_away_change_nothing(implementation: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(20, 3000, generator=generator) * 3).to(dtype)
    plain = (x, torch.arange(20), torch.full((20,), 0.9), numbers_of(20, generator))
    expected = draw_rows(*plain, implementation=implementation)
    for top_k in (-1, 0, 3000, 3001, 2**31 - 1):
        neutral = (torch.full((20,), top_k), torch.ones(20, dtype=torch.float64), torch.zeros(20))
        for out, wanted in zip(draw_rows(*plain, *neutral, implementation=implementation), expected, strict=True):
            assert torch.equal(out, wanted)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 700, "top_p": 1e-9}])
def test_one_place_is_always_left_and_of_equals_it_is_the_first(implementation: str, filters: dict[str, Any]) -> None:
    values = [0.0] * 1000
    values[400:] = [1.0] * 600
    for number in (0.0, 0.5, BELOW_ONE):
        assert draw_one(values, number, implementation, **filters) == 400
        assert draw_one(values, number, implementation, temperature=1e-20, **filters) == 400
    assert draw_one(values, BELOW_ONE, implementation, min_p=1.0) == 999


def test_zeros_of_both_signs_are_equal(implementation: str) -> None:
    values = [-0.0, 0.0] * 300
    assert draw_one(values, BELOW_ONE, implementation, top_k=3) == 2
    assert draw_one(values, BELOW_ONE, implementation, top_p=0.5) == 299


@dtypes
def test_a_draw_is_the_same_alone_in_a_batch_and_with_two_threads(implementation: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    count = 24
    x = (torch.randn(count, 4000, generator=generator) * 3).to(dtype)
    x[::4] = x[::4].float().mul(2).round().to(dtype)
    arguments = (
        *(torch.arange(count), torch.rand(count, generator=generator) + 0.3, numbers_of(count, generator)),
        *(torch.arange(count) % 5 * 60, torch.where(torch.arange(count) % 3 > 0, numbers_of(count, generator), 1.0)),
        torch.rand(count, generator=generator) * 0.01 * (torch.arange(count) % 2),
    )
    together = draw_rows(x, *arguments, implementation=implementation)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        in_two_threads = draw_rows(x, *arguments, implementation=implementation)
    finally:
        torch.set_num_threads(before)
    for out, wanted in zip(in_two_threads, together, strict=True):
        assert torch.equal(out, wanted)
    for i in range(count):
        rows, *others = (argument[i : i + 1] for argument in arguments)
        alone = draw_rows(x[i : i + 1], rows * 0, *others, implementation=implementation)
        for out, wanted in zip(alone, together, strict=True):
            assert torch.equal(out[0], wanted[i])


@pytest.mark.parametrize(
    ("filters", "weights"),
    [
        ({}, [4, 1, 3, 2]),
        ({"top_k": 2}, [4, 0, 3, 0]),
        ({"top_p": 0.65}, [4, 0, 3, 0]),
        ({"top_p": 0.75}, [4, 0, 3, 2]),
        ({"min_p": 0.45}, [4, 0, 3, 2]),
        # top_p counts within what min_p and top_k leave: 0.4 of 0.9 is 0.44, of 0.7 is 0.57.
        ({"min_p": 0.45, "top_p": 0.44}, [4, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.55}, [4, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4, 0, 3, 0]),
    ],
)
def test_places_are_drawn_as_often_as_they_should_be(implementation: str, filters: dict[str, Any], weights: list[int]) -> None:
    x = torch.full((1, 700), -math.inf)
    x[0, [3, 290, 310, 650]] = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    count = 2000
    # Numbers at even distances: what is off by more than one draw is not chance.
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    dtype_of = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float32}
    repeated = {name: torch.full((count,), value, dtype=dtype_of[name]) for name, value in filters.items()}
    tokens, _ = draw_rows(
        *(x, torch.zeros(count, dtype=torch.int64), torch.ones(count), numbers), **repeated, implementation=implementation
    )
    often = torch.bincount(tokens, minlength=700)[[3, 290, 310, 650]].tolist()
    assert often == pytest.approx([count * weight / sum(weights) for weight in weights], abs=1)
    assert sum(often) == count


@pytest.mark.parametrize("filters", [{}, {"top_k": 590}, {"top_p": 0.9, "min_p": 0.1}])
def test_a_place_without_weight_is_not_drawn_and_rows_that_are_not_numbers_say_so(
    implementation: str, filters: dict[str, Any]
) -> None:
    x = torch.full((5, 600), -math.inf)
    x[0, 3], x[1, 590], x[2, 5], x[2, 7], x[4, 1] = 1.0, math.nan, 0.0, -1e-3, math.inf
    numbers = torch.tensor([0.0, BELOW_ONE, 0.5, 0.0, BELOW_ONE, 0.5, 0.5], dtype=torch.float64)
    temperatures = torch.tensor([1.0, 1.0, 1.0, 1e-20, 1e-20, 1.0, 1.0])
    rows = torch.tensor([0, 0, 1, 2, 2, 3, 4])
    dtype_of = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float32}
    repeated = {name: torch.full((7,), value, dtype=dtype_of[name]) for name, value in filters.items()}
    tokens, logprobs = draw_rows(x, rows, temperatures, numbers, **repeated, implementation=implementation)
    assert tokens[[0, 1, 3, 4]].tolist() == [3, 3, 5, 5]
    assert logprobs.isfinite().tolist() == [True, True, False, True, True, False, False]
    assert logprobs[0] == 0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("top_k", torch.ones(2)),
        ("top_p", torch.ones(2)),
        ("min_p", torch.ones(3)),
        ("numbers", torch.ones(2)),
    ],
)
def test_an_argument_of_the_wrong_shape_or_dtype_is_named(name: str, tensor: Tensor) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 8),
        "rows": torch.tensor([0, 1]),
        "temperatures": torch.ones(2),
        "numbers": torch.zeros(2, dtype=torch.float64),
        name: tensor,
    }
    with pytest.raises(ValueError, match=rf"^{name} must be \[2\]"):
        draw_rows(**arguments)
