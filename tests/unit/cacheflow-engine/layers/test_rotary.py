"""Rotary settings, as old and new configurations spell them."""

from __future__ import annotations

import pytest
import torch

from cacheflow.errors import UnsupportedModelError
from cacheflow.interfaces import OpSpec
from cacheflow.layers import Rotary, rope_max_positions
from cacheflow.layers.rotary import rope_settings
from cacheflow.layers.torch_ops import TorchOps

CPU = torch.device("cpu")
OPS = TorchOps(OpSpec(dtype=torch.float32, device=CPU))


def table(**config: object) -> torch.Tensor:
    return Rotary({"max_position_embeddings": 32} | config, 16, True, OPS, CPU).cos_sin


def test_both_spellings_give_the_same_table() -> None:
    old = table(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}, partial_rotary_factor=0.5)
    new = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 0.5}
    assert torch.equal(old, table(rope_parameters=new))
    assert old.shape == (64, 8)


def test_linear_scaling_lengthens_the_context_by_its_factor() -> None:
    scaling = {"type": "linear", "factor": 4.0}
    assert rope_max_positions({"max_position_embeddings": 2048, "rope_scaling": scaling}) == 8192


def test_without_settings_the_defaults_of_the_paper_hold() -> None:
    assert rope_settings({}) == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


def test_settings_that_differ_between_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        rope_settings({"rope_parameters": {"full_attention": {"rope_type": "default"}}})


@pytest.mark.parametrize("is_neox", [True, False])
def test_what_lies_behind_the_rotary_size_stands_still(is_neox: bool) -> None:
    config = {"max_position_embeddings": 32, "partial_rotary_factor": 0.5}
    rotary = Rotary(config, 16, is_neox, OPS, CPU)
    q, k = torch.randn(3, 64), torch.randn(3, 32)
    turned_q, turned_k = rotary(q.clone(), k.clone(), torch.tensor([0, 5, 31]))
    for before, after in ((q, turned_q), (k, turned_k)):
        before, after = before.view(3, -1, 16), after.view(3, -1, 16)
        assert torch.equal(after[..., 8:], before[..., 8:])
        torch.testing.assert_close(after[0], before[0])
        assert not torch.allclose(after[1:, :, :8], before[1:, :, :8])
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
