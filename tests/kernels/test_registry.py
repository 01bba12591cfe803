"""Choosing an implementation."""

from __future__ import annotations

import pytest
import torch

import cacheflow_kernels
from cacheflow_kernels import rms_norm
from cacheflow_kernels.ops import REGISTRY
from cacheflow_kernels.registry import Implementation, Registry, UnsupportedError

CPU = torch.device("cpu")


def implementation(name: str, priority: int, *reasons: str) -> Implementation:
    return Implementation(name, lambda: name, lambda device, dtype: reasons, priority)


def test_auto_takes_the_preferred_implementation_that_can_run() -> None:
    registry = Registry()
    registry.add("op", implementation("plain", 0))
    registry.add("op", implementation("fast", 1))
    registry.add("op", implementation("absent", 2, "no GPU"))
    assert registry.select("op", "auto", CPU, torch.float32)() == "fast"
    assert registry.select("op", "plain", CPU, torch.float32)() == "plain"
    assert registry.reasons("op", CPU, torch.float32) == {"absent": ("no GPU",), "fast": (), "plain": ()}


def test_an_implementation_added_later_is_taken_when_it_is_preferred() -> None:
    registry = Registry()
    registry.add("op", implementation("plain", 0))
    assert registry.select("op", "auto", CPU, torch.float32)() == "plain"
    registry.add("op", implementation("fast", 1))
    assert registry.select("op", "auto", CPU, torch.float32)() == "fast"


def test_an_explicit_choice_that_cannot_run_says_why() -> None:
    registry = Registry()
    registry.add("op", implementation("absent", 2, "no GPU", "no driver"))
    with pytest.raises(UnsupportedError, match=r"op can't run on cpu in torch.float32: absent: no GPU, no driver\."):
        registry.select("op", "absent", CPU, torch.float32)
    with pytest.raises(UnsupportedError, match="no implementation 'fast'. There are: absent"):
        registry.select("op", "fast", CPU, torch.float32)


def test_two_implementations_of_one_name_are_refused() -> None:
    registry = Registry()
    registry.add("op", implementation("plain", 0))
    with pytest.raises(ValueError, match="named 'plain' already"):
        registry.add("op", implementation("plain", 1))


def test_every_public_operation_has_a_reference() -> None:
    assert set(REGISTRY.ops()) == set(cacheflow_kernels.__all__)
    for op in REGISTRY.ops():
        assert REGISTRY.reasons(op, CPU, torch.bfloat16)["reference"] == ()


def test_an_integer_input_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match=r"reference: torch.int64 is not a floating-point type"):
        rms_norm(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(8))
