"""The reference of paged attention against torch's own dense attention, and the operations on blocks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cacheflow_kernels import copy_blocks, paged_attention, store_kv, swap_blocks
from cacheflow_kernels.accuracy import LIMITS, PAGED_CASES, PagedCase, PagedInputs, paged_inputs, relative_rms

cases = pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name.replace(" ", "-"))


def attend(case: PagedCase, inputs: PagedInputs) -> torch.Tensor:
    return paged_attention(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        inputs.block_tables,
        inputs.seq_lens,
        inputs.query_start_loc,
        window=case.window,
        alibi_slopes=inputs.alibi_slopes,
        soft_cap=case.soft_cap,
    )


def dense_sequence(inputs: PagedInputs, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequence i's q, k and v as [heads, length, head_size], read position by position from the definition of a block table."""
    start, end = inputs.query_start_loc[i : i + 2].tolist()
    block_size = inputs.k_cache.shape[2]
    places = [(int(inputs.block_tables[i, p // block_size]), p % block_size) for p in range(int(inputs.seq_lens[i]))]
    k = torch.stack([inputs.k_cache[block, :, slot] for block, slot in places], dim=1)
    v = torch.stack([inputs.v_cache[block, :, slot] for block, slot in places], dim=1)
    return inputs.q[start:end].transpose(0, 1), k, v


@pytest.mark.parametrize("case", [c for c in PAGED_CASES if c.soft_cap is None], ids=lambda case: case.name.replace(" ", "-"))
def test_paged_attention_equals_dense_attention_over_the_gathered_blocks(case: PagedCase) -> None:
    inputs = paged_inputs(case)
    out = attend(case, inputs)
    for i, num_queries in enumerate(case.query_lens):
        if num_queries == 0:
            continue
        q, k, v = dense_sequence(inputs, i)
        distance = torch.arange(k.shape[1])[-num_queries:, None] - torch.arange(k.shape[1])
        visible = (distance >= 0) & (distance < (case.window or k.shape[1]))
        bias = torch.zeros(q.shape[0], *distance.shape, dtype=q.dtype)
        if inputs.alibi_slopes is not None:
            bias -= inputs.alibi_slopes.double()[:, None, None] * distance
        bias.masked_fill_(~visible, float("-inf"))
        expected = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias[None], enable_gqa=True)[0]
        start = int(inputs.query_start_loc[i])
        assert relative_rms(out[start : start + num_queries], expected.transpose(0, 1)) <= LIMITS[torch.float64]


def test_a_soft_cap_bounds_the_scores() -> None:
    case = PagedCase(name="", query_lens=(1,), context_lens=(1,), num_heads=1, num_kv_heads=1)
    inputs = paged_inputs(case)
    q, k, v = dense_sequence(inputs, 0)
    scores = 0.5 * torch.tanh((q @ k.transpose(1, 2)) / 8 / 0.5)
    out = paged_attention(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_tables, inputs.seq_lens, inputs.query_start_loc, soft_cap=0.5
    )
    assert relative_rms(out[:, 0], (scores.softmax(-1) @ v)[0]) <= LIMITS[torch.float64]


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_in_a_narrow_dtype_stays_within_its_limit(case: PagedCase, dtype: torch.dtype) -> None:
    narrow = paged_inputs(case).to(dtype)
    assert relative_rms(attend(case, narrow), attend(case, narrow.to(torch.float64))) <= LIMITS[dtype]


@cases
def test_a_sequence_gets_the_same_result_whatever_else_is_in_the_batch(case: PagedCase) -> None:
    inputs = paged_inputs(case).to(torch.float32)
    together = attend(case, inputs)
    for i, num_queries in enumerate(case.query_lens):
        start = int(inputs.query_start_loc[i])
        alone = PagedInputs(
            q=inputs.q[start : start + num_queries],
            k_cache=inputs.k_cache,
            v_cache=inputs.v_cache,
            block_tables=inputs.block_tables[i : i + 1],
            seq_lens=inputs.seq_lens[i : i + 1],
            query_start_loc=torch.tensor([0, num_queries], dtype=torch.int32),
            alibi_slopes=inputs.alibi_slopes,
        )
        assert torch.equal(attend(case, alone), together[start : start + num_queries])


def test_stored_keys_and_values_are_found_at_their_slots_and_nowhere_else() -> None:
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    k_cache, v_cache = torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)
    store_kv(k, v, k_cache, v_cache, torch.tensor([9, -1, 0, 7]))
    for cache, rows in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[2, :, 1], rows[0])
        assert torch.equal(cache[0, :, 0], rows[2])
        assert torch.equal(cache[1, :, 3], rows[3])
        assert int((cache != 0).any(dim=-1).sum()) == 6


def test_attention_over_what_was_stored_in_chunks_equals_attention_over_the_whole() -> None:
    case = PagedCase(name="", query_lens=(23,), context_lens=(0,))
    inputs = paged_inputs(case).to(torch.float32)
    whole = attend(case, inputs)
    pieces = []
    for start, end in ((0, 3), (3, 16), (16, 23)):
        piece = PagedInputs(
            q=inputs.q[start:end],
            k_cache=inputs.k_cache,
            v_cache=inputs.v_cache,
            block_tables=inputs.block_tables,
            seq_lens=torch.tensor([end], dtype=torch.int32),
            query_start_loc=torch.tensor([0, end - start], dtype=torch.int32),
            alibi_slopes=None,
        )
        pieces.append(attend(case, piece))
    assert relative_rms(torch.cat(pieces), whole) <= LIMITS[torch.float32]


def test_copied_blocks_are_read_before_any_is_written() -> None:
    caches = [torch.arange(4.0)[:, None].repeat(1, 3), torch.arange(4.0)[:, None].repeat(1, 5) + 10]
    copy_blocks(caches, torch.tensor([[0, 1], [1, 2]]))
    assert [cache[:, 0].tolist() for cache in caches] == [[0, 0, 1, 3], [10, 10, 11, 13]]


def test_swapped_blocks_arrive_in_the_other_cache() -> None:
    source, destination = torch.randn(4, 2, 8), torch.zeros(6, 2, 8)
    swap_blocks(source, destination, torch.tensor([[3, 0], [1, 5]]))
    assert torch.equal(destination[0], source[3])
    assert torch.equal(destination[5], source[1])
    assert not destination[1:5].any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.zeros(1, 3, 64)}),
        ("v_cache", {"v_cache": torch.zeros(1, 2, 16, 64)}),
        ("seq_lens", {"seq_lens": torch.tensor([3])}),
        ("query_start_loc", {"query_start_loc": torch.tensor([0], dtype=torch.int32)}),
        ("block_tables", {"block_tables": torch.zeros(2, 1, dtype=torch.int32)}),
        ("window", {"window": 0}),
        ("alibi_slopes", {"alibi_slopes": torch.zeros(3)}),
    ],
)
def test_a_malformed_argument_is_named(name: str, change: dict[str, object]) -> None:
    inputs = paged_inputs(PagedCase(name="", query_lens=(1,), context_lens=(2,)))
    arguments = {
        "q": inputs.q,
        "k_cache": inputs.k_cache,
        "v_cache": inputs.v_cache,
        "block_tables": inputs.block_tables,
        "seq_lens": inputs.seq_lens,
        "query_start_loc": inputs.query_start_loc,
    } | change
    with pytest.raises(ValueError, match=f"^{name} must be"):
        paged_attention(**arguments)
