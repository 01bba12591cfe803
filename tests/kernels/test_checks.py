"""Bad arguments are refused at the public operations, under their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cacheflow_kernels import copy_blocks, ops, paged_attention, rms_norm, rotary, silu_and_mul, store_kv, swap_blocks
from cacheflow_kernels.accuracy import PagedCase, paged_inputs


def arguments(**change: Any) -> dict[str, Any]:
    """Of `paged_attention`: 23 positions, 20 of them cached, in blocks 0 to 4 of a cache that has 5."""
    inputs = paged_inputs(PagedCase(name="", query_lens=(3,), context_lens=(20,)))
    assert inputs.k_cache.shape[0] == 5
    names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
    return {name: getattr(inputs, name) for name in names} | change


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


@pytest.mark.parametrize("name", ["k_cache", "block_tables", "seq_lens", "query_start_loc", "alibi_slopes"])
def test_an_argument_on_another_device_is_named(name: str) -> None:
    given = arguments(alibi_slopes=torch.ones(4))
    given[name] = given[name].to("meta")
    if name == "k_cache":
        given["v_cache"] = given["v_cache"].to("meta")
    with pytest.raises(ValueError, match=f"^{name} must be on cpu like the other arguments, got meta"):
        paged_attention(**given)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "block_tables", "seq_lens"])
def test_an_argument_with_gaps_is_named(name: str) -> None:
    given = arguments()
    if name == "seq_lens":
        given |= {key: given[key].repeat(2, 1) if key == "block_tables" else given[key] for key in given}
        given["seq_lens"], given["query_start_loc"] = given["seq_lens"].repeat(2), torch.tensor([0, 3, 3], dtype=torch.int32)
    given[name] = strided(given[name])
    with pytest.raises(ValueError, match=f"^{name} must be contiguous in its last axis"):
        paged_attention(**given)


def test_rows_with_gaps_are_named() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="^x must be contiguous"):
        rms_norm(strided(x), weight)
    with pytest.raises(ValueError, match="^weight must be contiguous"):
        rms_norm(x, strided(weight))
    with pytest.raises(ValueError, match="^x must be contiguous"):
        silu_and_mul(strided(x))
    with pytest.raises(ValueError, match="^k must be contiguous"):
        rotary(x, strided(x), torch.zeros(2, dtype=torch.int64), torch.ones(4, 8), 8)


@pytest.fixture
def _debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CACHEFLOW_DEBUG=1 does when the package is imported."""
    monkeypatch.setattr(ops, "IS_DEBUG", True)


@pytest.mark.usefixtures("_debug")
@pytest.mark.parametrize("block", [-1, 5])
def test_in_debug_mode_an_unknown_block_is_refused(block: int) -> None:
    given = arguments()
    paged_attention(**given)
    given["block_tables"][0, 1] = block
    with pytest.raises(ValueError, match=rf"^block_tables must hold block numbers from 0 to 4, got \[{block}\]"):
        paged_attention(**given)


@pytest.mark.usefixtures("_debug")
def test_in_debug_mode_a_length_beyond_the_block_table_is_refused() -> None:
    given = arguments()
    given["seq_lens"][0] = 65
    with pytest.raises(ValueError, match=r"^seq_lens must hold lengths that fit into 4 blocks of 16, from 0 to 64, got \[65\]"):
        paged_attention(**given)


@pytest.mark.usefixtures("_debug")
def test_in_debug_mode_falling_query_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="^query_start_loc must begin with 0"):
        paged_attention(**arguments(query_start_loc=torch.tensor([3, 0], dtype=torch.int32)))


@pytest.mark.usefixtures("_debug")
def test_in_debug_mode_an_unknown_slot_is_refused() -> None:
    k, cache = torch.ones(2, 1, 8), torch.zeros(3, 1, 4, 8)
    store_kv(k, k, cache, cache.clone(), torch.tensor([-1, 11]))
    with pytest.raises(ValueError, match=r"^slot_mapping must hold slots from 0 to 11, got \[12\]"):
        store_kv(k, k, cache, cache.clone(), torch.tensor([-1, 12]))


@pytest.mark.usefixtures("_debug")
def test_in_debug_mode_unknown_blocks_are_not_copied() -> None:
    small, large = torch.zeros(2, 8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"^pairs must hold block numbers from 0 to 1, got \[2\]"):
        copy_blocks([large, small], torch.tensor([[0, 2]]))
    swap_blocks(large, small, torch.tensor([[3, 1]]))
    with pytest.raises(ValueError, match=r"^pairs must hold block numbers from 0 to 1, got \[3\]"):
        swap_blocks(large, small, torch.tensor([[1, 3]]))
