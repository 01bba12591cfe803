"""Which dtype is loaded and computed in."""

from __future__ import annotations

import pytest
import torch

from cacheflow.errors import ConfigError
from cacheflow.loading import dtype as dtypes
from cacheflow.loading.dtype import choose_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("requested", ["auto", "default"])
@pytest.mark.parametrize(
    ("stored", "device", "expected"),
    [
        ("bfloat16", CPU, torch.bfloat16),
        ("float32", CPU, torch.float32),
        ("float16", CPU, torch.float32),
        ("float16", CUDA, torch.float16),
        ("torch.bfloat16", CUDA, torch.bfloat16),
    ],
)
def test_auto_is_the_checkpoints_own_where_the_device_computes_in_it(
    key: str, requested: str, stored: str, device: torch.device, expected: torch.dtype
) -> None:
    assert choose_dtype(requested, {key: stored}, device) is expected


@pytest.mark.parametrize(("flag", "expected"), [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_quantised_weights_are_unpacked_to_what_the_processor_computes_in(
    monkeypatch: pytest.MonkeyPatch, flag: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(dtypes, "_processor_flags", lambda: frozenset({flag}))
    assert choose_dtype("auto", {"dtype": None}, CPU) is expected


@pytest.mark.parametrize(
    ("requested", "expected"),
    [("half", torch.float16), ("float16", torch.float16), ("float", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_an_explicit_dtype_is_taken_as_it_is(requested: str, expected: torch.dtype) -> None:
    assert choose_dtype(requested, {"dtype": "float32"}, CPU) is expected


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match="int8"):
        choose_dtype("int8", {}, CPU)
