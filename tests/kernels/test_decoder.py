"""The CPU kernels that fuse what lies between two attention calls, against the single ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace

import pytest
import torch

from cacheflow.interfaces import AttentionMetadata, KVCacheSpec, OpSpec
from cacheflow.layers import BuildContext
from cacheflow.layers.decoder import StepAttention
from cacheflow.layers.quantization import LinearForms
from cacheflow.models.llama import Llama
from cacheflow.profile import Spans, TimedOps
from cacheflow_kernels.attention import CpuAttention
from cacheflow_kernels.cpu import library
from cacheflow_kernels.providers import CpuOps

pytestmark = pytest.mark.skipif(bool(library.reasons()), reason="needs the CPU kernels")

CPU = torch.device("cpu")
SIZES = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": True}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def forward(
    dtype: torch.dtype, num_tokens: int, *, is_fused: bool, settings: Mapping[str, int], form: str = "plain"
) -> tuple[torch.Tensor, list[int]]:
    """Hidden states of a small random model whose attention is a mixture of what it is given, and the order of its layers."""
    provider = CpuOps(OpSpec(dtype=dtype, device=CPU))
    # Seen op by op, a provider has no fused decoder.
    context = BuildContext(provider if is_fused else TimedOps(provider, Spans()), dtype, CPU, forms=LinearForms(layers=form))
    model = Llama({**Llama.TINY, **SIZES, **settings}, context)
    random = torch.Generator().manual_seed(0)
    for name, shape in context.shapes.items():
        context.load(name, torch.randn(shape, generator=random) * 0.1 + (1 if "norm" in name else 0))
    context.finish()
    layers = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layers.append(layer)
        return q + torch.cat((k, v), dim=-1).roll(1, 0)

    tokens = torch.randint(0, 99, (num_tokens,), generator=random)
    hidden = model.forward(model.embed(tokens), torch.arange(num_tokens) % 50, attend)
    return hidden, layers


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_decoder_gives_bit_for_bit_what_its_ops_give(
    dtype: torch.dtype, num_tokens: int, settings: dict[str, int]
) -> None:
    fused, layers = forward(dtype, num_tokens, is_fused=True, settings=settings)
    single, _ = forward(dtype, num_tokens, is_fused=False, settings=settings)
    assert layers == [0, 1]
    assert torch.equal(fused, single)


@pytest.mark.parametrize(("form", "inner"), [("plain", 112), ("int8_dynamic", 112), ("int8_dynamic", 128)])
@pytest.mark.parametrize("num_tokens", [80, 300, 1100, 3300])
def test_rows_shared_out_among_threads_give_the_same_bits(
    num_tokens: int, form: str, inner: int, threads: Callable[[int], None]
) -> None:
    settings = {"intermediate_size": inner}
    single, _ = forward(torch.bfloat16, num_tokens, is_fused=False, settings=settings, form=form)
    threads(2)
    fused, _ = forward(torch.bfloat16, num_tokens, is_fused=True, settings=settings, form=form)
    assert torch.equal(fused, single)


def test_products_of_another_maker_are_not_fused() -> None:
    layer = SimpleNamespace(qkv=abs, out=abs, gate_up=abs, down=abs)
    provider = CpuOps(OpSpec(dtype=torch.float32, device=CPU))
    assert provider.decoder([layer], torch.ones(8), 1e-5, SimpleNamespace(cos_sin=torch.ones(2, 8))) is None


@pytest.mark.parametrize("form", ["int8", "int4", "int8_dynamic"])
def test_quantised_products_are_fused_to_the_same_bits(form: str) -> None:
    fused, _ = forward(torch.bfloat16, 5, is_fused=True, settings={}, form=form)
    single, _ = forward(torch.bfloat16, 5, is_fused=False, settings={}, form=form)
    assert torch.equal(fused, single)


@pytest.mark.parametrize("query_lens", [(1,), (1, 1, 5), (300, 1, 9)], ids=["one", "mixed", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_decoder_that_attends_by_itself_gives_the_same_bits_and_cache(
    dtype: torch.dtype, query_lens: tuple[int, ...], num_threads: int, threads: Callable[[int], None]
) -> None:
    threads(num_threads)
    provider = CpuOps(OpSpec(dtype=dtype, device=CPU))
    settings = {**Llama.TINY, **SIZES, "max_position_embeddings": 512}
    context, spec = BuildContext(provider, dtype, CPU), Llama.spec(settings)
    model = Llama(settings, context)
    random = torch.Generator().manual_seed(0)
    for name, shape in context.shapes.items():
        context.load(name, torch.randn(shape, generator=random) * 0.1 + (1 if "norm" in name else 0))
    context.finish()
    block_size = 16
    backend = CpuAttention(
        KVCacheSpec(
            attention=spec.attention,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            block_size=block_size,
            dtype=dtype,
            device=CPU,
        )
    )
    starts, before = [0], [3 + i for i in range(len(query_lens))]
    for query_len in query_lens:
        starts.append(starts[-1] + query_len)
    positions = torch.cat([torch.arange(b, b + n) for b, n in zip(before, query_lens, strict=True)])
    tables = torch.randperm(20 * len(query_lens), generator=random).view(len(query_lens), 20)
    owners = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([b + n for b, n in zip(before, query_lens, strict=True)], dtype=torch.int32),
        block_tables=tables.int(),
        slot_mapping=tables[owners, positions // block_size] * block_size + positions % block_size,
        num_decodes=query_lens.count(1),
        max_query_len=max(query_lens),
        max_seq_len=max(b + n for b, n in zip(before, query_lens, strict=True)),
    )
    first = [torch.randn(backend.kv_shape(tables.numel()), generator=random).to(dtype) for _ in spec.attention]
    second = [cache.clone() for cache in first]
    plan = backend.plan(metadata)
    whole = StepAttention(backend.forward, spec.attention, first, plan, spec.head_size)
    in_parts = StepAttention(backend.forward, spec.attention, second, plan, spec.head_size)
    hidden = model.embed(torch.randint(0, 99, (starts[-1],), generator=random))
    attending = model.forward(hidden.clone(), positions, whole)
    asking = model.forward(hidden.clone(), positions, lambda layer, q, k, v: in_parts(layer, q, k, v))
    assert torch.equal(attending, asking)
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))
