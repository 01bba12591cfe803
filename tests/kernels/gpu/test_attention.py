"""Paged attention on a GPU, through each implementation that can run there, and the engine's backends over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheflow_kernels import paged_attention, store_kv
from cacheflow_kernels.accuracy import LIMITS, PAGED_CASES, PagedCase, PagedInputs, paged_inputs, relative_rms
from cacheflow_kernels.attention import CudaAttention, TritonAttention
from cacheflow_kernels.cuda import attention as cuda_attention
from cacheflow_kernels.cuda.library import KernelError
from cacheflow_kernels.ops import REGISTRY

GPU = torch.device("cuda", 0)
IMPLEMENTATIONS = pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("cuda", torch.float16),
        ("cuda", torch.bfloat16),
        ("triton", torch.float16),
        ("triton", torch.bfloat16),
        ("triton", torch.float32),
    ],
    ids=str,
)
CASES = (
    *PAGED_CASES,
    PagedCase(name="exactly one split", query_lens=(1, 1), context_lens=(511, 512)),
    PagedCase(name="many splits", query_lens=(1, 1, 1, 70), context_lens=(9000, 3, 4095, 2000), num_heads=8, num_kv_heads=2),
    PagedCase(name="a window over three splits", query_lens=(1, 3), context_lens=(1436, 1436), window=522),
    PagedCase(name="a window behind whole splits", query_lens=(1, 1), context_lens=(1536, 5), window=40),
    PagedCase(name="32 heads over one", query_lens=(1, 5), context_lens=(600, 30), num_heads=32, num_kv_heads=1),
    PagedCase(name="alibi over many splits", query_lens=(1, 9), context_lens=(3000, 1000), has_alibi=True),
    *(
        PagedCase(
            name=f"head size {size}, block size {block}, {heads} heads",
            query_lens=(1, 19),
            context_lens=(777, 40),
            num_heads=heads,
            head_size=size,
            block_size=block,
        )
        for size, block in zip(cuda_attention.HEAD_SIZES, (8, 16, 32, 8, 16, 32, 8, 16), strict=True)
        for heads in (2, 10)
    ),
)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))


def attend(case: PagedCase, inputs: PagedInputs, implementation: str) -> Tensor:
    why_not = REGISTRY.reasons("paged_attention", inputs.q.device, inputs.q.dtype)[implementation]
    assert not why_not, f"{implementation}: {', '.join(why_not)}"
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
        implementation=implementation,
    )


def alone(inputs: PagedInputs, i: int) -> PagedInputs:
    """Sequence i as a batch of its own."""
    start, stop = inputs.query_start_loc[i : i + 2].tolist()
    return PagedInputs(
        q=inputs.q[start:stop],
        k_cache=inputs.k_cache,
        v_cache=inputs.v_cache,
        block_tables=inputs.block_tables[i : i + 1],
        seq_lens=inputs.seq_lens[i : i + 1],
        query_start_loc=torch.tensor([0, stop - start], dtype=torch.int32, device=inputs.q.device),
        alibi_slopes=inputs.alibi_slopes,
    )


@cases
@IMPLEMENTATIONS
def test_attention_stays_within_the_limit(case: PagedCase, implementation: str, dtype: torch.dtype) -> None:
    inputs = paged_inputs(case, device=str(GPU)).to(dtype)
    out = attend(case, inputs, implementation)
    assert relative_rms(out, attend(case, inputs.to(torch.float64), "reference")) <= LIMITS[dtype]


@cases
@IMPLEMENTATIONS
def test_a_sequence_gets_the_same_bits_whatever_else_is_in_the_batch(
    case: PagedCase, implementation: str, dtype: torch.dtype
) -> None:
    inputs = paged_inputs(case, device=str(GPU)).to(dtype)
    together = attend(case, inputs, implementation)
    for i, num_queries in enumerate(case.query_lens):
        if num_queries:
            start = int(inputs.query_start_loc[i])
            assert torch.equal(attend(case, alone(inputs, i), implementation), together[start : start + num_queries])


@IMPLEMENTATIONS
def test_every_run_gives_the_same_bits(implementation: str, dtype: torch.dtype) -> None:
    case = PagedCase(name="", query_lens=(1,) * 64 + (300,), context_lens=(*range(0, 1600, 25), 500), head_size=128)
    inputs = paged_inputs(case, device=str(GPU)).to(dtype)
    first = attend(case, inputs, implementation)
    for _ in range(20):
        assert torch.equal(attend(case, inputs, implementation), first)


def test_a_sequence_without_positions_gets_zeros() -> None:
    case = PagedCase(name="", query_lens=(1, 1), context_lens=(0, 40))
    inputs = paged_inputs(case, device=str(GPU)).to(torch.float16)
    inputs.seq_lens[0] = 0
    assert not attend(case, inputs, "cuda")[0].any()


def test_a_launch_that_cuda_refuses_raises_with_the_kernels_name() -> None:
    case = PagedCase(name="", query_lens=(1,), context_lens=(5,))
    inputs = paged_inputs(case, device=str(GPU)).to(torch.float16)
    splits = 70_000
    wide = torch.zeros(1, splits * 512 // case.block_size, dtype=torch.int32, device=GPU)
    with pytest.raises(KernelError, match="^paged_decode failed on cuda:0: CUDA error "):
        paged_attention(
            inputs.q,
            inputs.k_cache,
            inputs.v_cache,
            wide,
            inputs.seq_lens,
            inputs.query_start_loc,
            implementation="cuda",
        )


@dataclass(frozen=True)
class Layer:
    """The engine's `AttentionSpec`, as far as backends read it."""

    scale: float = 64**-0.5
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    soft_cap: float | None = None


@dataclass(frozen=True)
class Spec:
    """The engine's `KVCacheSpec`, likewise."""

    attention: tuple[Layer, ...] = (Layer(),)
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = GPU


@dataclass(frozen=True)
class Metadata:
    """The engine's `AttentionMetadata`."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int


def metadata(query_lens: list[int], context_lens: list[int], width: int = 64) -> Metadata:
    """Sequence i owns the blocks from `i * width` on."""
    lens = [query + context for query, context in zip(query_lens, context_lens, strict=True)]
    slots = [i * width * 16 + p for i, length in enumerate(lens) for p in range(length - query_lens[i], length)]
    return Metadata(
        query_start_loc=torch.tensor([0, *query_lens], device=GPU).cumsum(0, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=GPU),
        block_tables=torch.arange(len(lens) * width, dtype=torch.int32, device=GPU).view(len(lens), width),
        slot_mapping=torch.tensor(slots, device=GPU),
        num_decodes=sum(length == 1 for length in query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(lens),
    )


def expected(layer: Layer, q: Tensor, kv: Tensor, batch: Metadata) -> Tensor:
    slopes = None if layer.alibi_slopes is None else torch.tensor(layer.alibi_slopes, device=GPU)
    return paged_attention(
        q.double(),
        kv[:, 0].double(),
        kv[:, 1].double(),
        batch.block_tables,
        batch.seq_lens,
        batch.query_start_loc,
        scale=layer.scale,
        window=layer.window,
        alibi_slopes=slopes,
        soft_cap=layer.soft_cap,
        implementation="reference",
    )


BACKENDS = pytest.mark.parametrize("backend", [CudaAttention, TritonAttention])
LAYERS = (Layer(), Layer(window=30), Layer(alibi_slopes=tuple(2.0**-i for i in range(8))), Layer(soft_cap=3.0))


@BACKENDS
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_backend_stores_and_attends(backend: Any, layer: Layer) -> None:
    spec = Spec(attention=(layer,))
    assert backend.supports(spec) == ()
    runner = backend(spec)
    batch = metadata([1, 1, 40, 3], [700, 0, 0, 100])
    kv = torch.randn(runner.kv_shape(4 * 64), dtype=spec.dtype, device=GPU)
    qkv = torch.randn(45, 12, 64, dtype=spec.dtype, device=GPU)
    q, k, v = qkv.split((8, 2, 2), dim=1)
    out = runner.forward(layer, q, k, v, kv, runner.plan(batch))
    for part, new in ((0, k), (1, v)):
        stored = kv[:, part].transpose(1, 2).flatten(0, 1)[batch.slot_mapping]
        assert torch.equal(stored, new)
    assert relative_rms(out, expected(layer, q, kv, batch)) <= LIMITS[spec.dtype]


@BACKENDS
def test_a_captured_step_serves_a_refilled_plan(backend: Any) -> None:
    spec, layer = Spec(), Layer()
    runner = backend(spec)
    kv = torch.randn(runner.kv_shape(3 * 64), dtype=spec.dtype, device=GPU)
    q, k, v = (torch.randn(3, heads, 64, dtype=spec.dtype, device=GPU) for heads in (8, 2, 2))
    first = metadata([1, 1, 1], [5, 20, 300])
    plan = runner.plan(first)
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        runner.forward(layer, q, k, v, kv, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner.forward(layer, q, k, v, kv, plan)
    second = metadata([1, 1, 1], [900, 1, 513])
    runner.plan(second, into=plan)
    for tensor in (q, k, v):
        tensor.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert relative_rms(out, expected(layer, q, kv, second)) <= LIMITS[spec.dtype]


@BACKENDS
def test_a_backend_copies_and_swaps_blocks_of_all_layers(backend: Any) -> None:
    runner = backend(Spec())
    layers = [torch.randn(runner.kv_shape(6), dtype=torch.bfloat16, device=GPU) for _ in range(3)]
    before = [layer.clone() for layer in layers]
    runner.copy_blocks(layers, [(0, 1), (1, 2), (4, 5)])
    host = [torch.zeros(runner.kv_shape(4), dtype=torch.bfloat16, pin_memory=i > 0) for i in range(3)]
    runner.swap_blocks(layers, host, [(1, 0), (2, 1), (5, 3)])
    for kept, layer, swapped in zip(before, layers, host, strict=True):
        assert torch.equal(layer[[1, 2, 5]], kept[[0, 1, 4]])
        assert torch.equal(swapped[[0, 1, 3]].to(GPU), kept[[0, 1, 4]])
    back = [torch.zeros_like(layer) for layer in layers]
    runner.swap_blocks(host, back, [(0, 5), (3, 2)])
    for kept, layer in zip(before, back, strict=True):
        assert torch.equal(layer[[5, 2]], kept[[0, 4]])


def test_kernels_run_in_torchs_current_stream() -> None:
    k = torch.zeros(4, 2, 64, dtype=torch.float16, device=GPU)
    cache = torch.zeros(3, 2, 4, 64, dtype=torch.float16, device=GPU)
    slots = torch.tensor([0, 1, 2, 11], device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        k += 1
        store_kv(k, k, cache, cache.clone(), slots, implementation="cuda")
        torch.cuda.current_stream().synchronize()
    assert int((cache == 1).sum()) == 4 * 2 * 64
