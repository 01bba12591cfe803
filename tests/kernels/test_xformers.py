"""The xformers backend without a GPU: its masks, what it leaves to Triton, and its reasons. It has no operator for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cacheflow_kernels import paged_attention
from cacheflow_kernels.accuracy import LIMITS, PagedCase, paged_inputs, relative_rms
from cacheflow_kernels.attention import TritonAttention
from cacheflow_kernels.xformers import XformersAttention, prompt_mask

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layer:
    layer: int = 0
    scale: float = 0.125
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    soft_cap: float | None = None


@dataclass(frozen=True)
class Spec:
    attention: tuple[Layer, ...] = (Layer(),)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float16
    device: torch.device = CPU


@dataclass(frozen=True)
class Batch:
    """What the engine's metadata says of sequences with these numbers of query tokens and of tokens before them."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    max_query_len: int


def batch(query_lens: list[int], context_lens: list[int]) -> Batch:
    lens = torch.tensor(query_lens) + torch.tensor(context_lens)
    return Batch(
        query_start_loc=torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seq_lens=lens.to(torch.int32),
        block_tables=torch.arange(4 * len(lens), dtype=torch.int32).view(-1, 4),
        slot_mapping=torch.arange(sum(query_lens)),
        num_decodes=query_lens.count(1),
        max_query_len=max(query_lens),
    )


@pytest.mark.parametrize("window", [None, 1, 5], ids=["no window", "window of 1", "window of 5"])
def test_attention_under_the_mask_is_paged_attention_of_whole_prompts(window: int | None) -> None:
    pytest.importorskip("xformers.ops", reason="xformers is an optional extra and is not installed")
    case = PagedCase(name="", query_lens=(5, 16, 33), context_lens=(0, 0, 0), num_kv_heads=4, window=window)
    tensors = paged_inputs(case)
    lens = list(case.query_lens)
    bias = prompt_mask(lens, window, CPU).materialize((sum(lens), sum(lens)), dtype=torch.float64)
    k, v = (
        torch.cat([cache[tensors.block_tables[i, t // 16], :, t % 16][None] for i, n in enumerate(lens) for t in range(n)])
        for cache in (tensors.k_cache, tensors.v_cache)
    )
    scores = torch.einsum("qhd,khd->hqk", tensors.q, k) / 8 + bias
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    expected = paged_attention(
        tensors.q,
        tensors.k_cache,
        tensors.v_cache,
        tensors.block_tables,
        tensors.seq_lens,
        tensors.query_start_loc,
        window=window,
        implementation="reference",
    )
    assert relative_rms(out, expected) <= LIMITS[torch.float64]


def plan_of(metadata: Batch, into: Any = None) -> Any:
    for package in ("xformers.ops", "triton"):
        pytest.importorskip(package, reason=f"{package} is an optional extra and is not installed")
    return XformersAttention(Spec()).plan(metadata, into)


def test_only_whole_prompts_go_to_xformers() -> None:
    plan = plan_of(batch([1, 3, 2, 4], [8, 0, 5, 0]))
    assert plan.prompt_rows.tolist() == [1, 2, 3, 6, 7, 8, 9]
    assert plan.rest_rows.tolist() == [0, 4, 5]
    assert plan.rest.query_start_loc.tolist() == [0, 1, 3]
    assert plan.rest.seq_lens.tolist() == [9, 7]
    assert plan.rest.block_tables[:, 0].tolist() == [0, 8]
    assert (plan.rest.num_decodes, plan.rest.max_query_len) == (1, 2)


def test_a_batch_of_one_kind_is_served_without_picking_rows() -> None:
    prompts, decodes = plan_of(batch([3, 4], [0, 0])), plan_of(batch([1, 1], [3, 9]))
    assert prompts.rest is None
    assert decodes.masks == {}
    assert prompts.prompt_rows is decodes.prompt_rows is None


def test_a_plan_without_prompts_can_be_refilled_and_one_with_prompts_cannot() -> None:
    decodes, prompts = plan_of(batch([1, 1], [3, 9])), plan_of(batch([3, 4], [0, 0]))
    assert plan_of(batch([1, 1], [4, 10]), into=decodes).rest.seq_lens.tolist() == [5, 11]
    with pytest.raises(ValueError, match="whole prompts can't refill a plan"):
        plan_of(batch([3, 4], [0, 0]), into=decodes)
    with pytest.raises(ValueError, match="holds whole prompts can't be refilled"):
        plan_of(batch([1, 1], [3, 9]), into=prompts)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Spec(), "needs a CUDA device, not cpu"),
        (Spec(dtype=torch.float32), "xformers' fast attention needs float16 or bfloat16, not torch.float32"),
        (Spec(head_size=36), "xformers needs a head size that is a multiple of 8, not 36"),
        (Spec(attention=(Layer(), Layer(alibi_slopes=(0.5,) * 4))), "has no ALiBi"),
        (Spec(attention=(Layer(soft_cap=30.0),)), "has no soft cap"),
    ],
    ids=["cpu", "float32", "head size 36", "alibi", "soft cap"],
)
def test_what_it_cannot_serve_is_a_reason_why_not(spec: Spec, reason: str) -> None:
    assert reason in XformersAttention.supports(spec)


def test_its_cache_is_laid_out_as_triton_reads_it() -> None:
    pytest.importorskip("triton", reason="triton is an optional extra and is not installed")
    assert XformersAttention(Spec()).kv_shape(7) == TritonAttention(Spec()).kv_shape(7) == (7, 2, 2, 16, 64)
