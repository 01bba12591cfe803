"""The engine's own attention against a loop over single tokens in float32, over awkward shapes."""

from __future__ import annotations

import math

import pytest
import torch

from cacheflow.attention import torch_backend
from cacheflow.attention.torch_backend import TorchAttention
from cacheflow.interfaces import AttentionMetadata, AttentionSpec, KVCacheSpec

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""RMS of the error over RMS of the reference."""

PLAIN = {"window": None, "alibi_slopes": None, "soft_cap": None}
KINDS = {
    "plain": PLAIN,
    "window": {**PLAIN, "window": 5},
    "alibi": {**PLAIN, "alibi_slopes": (0.5, 0.25, 0.125, 0.0625, 0.4, 0.3)},
    "soft_cap": {**PLAIN, "soft_cap": 2.0},
    "everything": {"window": 9, "alibi_slopes": (0.5, 0.25, 0.125, 0.0625, 0.4, 0.3), "soft_cap": 3.0},
}

BATCHES = {
    "one token": [(0, 1)],
    "decodes": [(0, 1), (1, 1), (6, 1), (7, 1), (8, 1), (40, 1), (15, 1)],
    "prompts": [(0, 2), (0, 7), (0, 16), (0, 33)],
    "chunks": [(1, 2), (8, 8), (13, 11), (31, 2)],
    "mixture": [(16, 1), (0, 1), (50, 1), (0, 9), (5, 20), (16, 3)],
}
"""(tokens in the cache, tokens of this step) of each sequence."""


class Batch:
    """Sequences whose blocks lie anywhere in a cache that holds garbage elsewhere."""

    def __init__(self, spec: KVCacheSpec, lengths: list[tuple[int, int]]) -> None:
        self.spec, self.lengths = spec, lengths
        generator = torch.Generator().manual_seed(len(lengths))
        counts = [-(-(cached + new) // spec.block_size) for cached, new in lengths]
        blocks = torch.randperm(sum(counts) + 2, generator=generator).tolist()
        self.tables = [[blocks.pop() for _ in range(count)] for count in counts]
        heads = spec.num_heads + 2 * spec.num_kv_heads
        self.tokens = [
            torch.randn(cached + new, heads, spec.head_size, generator=generator).to(spec.dtype) for cached, new in lengths
        ]
        self.backend = TorchAttention(spec)
        self.kv = torch.full(self.backend.kv_shape(sum(counts) + 2), math.nan, dtype=spec.dtype)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v as views of one tensor: contiguous in the last axis only."""
        sizes = [self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads]
        return torch.split(rows, sizes, dim=1)

    def run(self, layer: AttentionSpec, spans: list[tuple[int, int, int]]) -> torch.Tensor:
        """Tokens `[start, stop)` of sequence i, for each (i, start, stop)."""
        size = self.spec.block_size
        width = max(len(table) for table in self.tables)
        query_lens = [stop - start for _, start, stop in spans]
        slots = [self.tables[i][t // size] * size + t % size for i, start, stop in spans for t in range(start, stop)]
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).int(),
            seq_lens=torch.tensor([stop for _, _, stop in spans], dtype=torch.int32),
            block_tables=torch.tensor(
                [self.tables[i] + [-1] * (width - len(self.tables[i])) for i, _, _ in spans], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots),
            num_decodes=query_lens.count(1),
            max_query_len=max(query_lens),
            max_seq_len=max(stop for _, _, stop in spans),
        )
        q, k, v = self.split(torch.cat([self.tokens[i][start:stop] for i, start, stop in spans]))
        return self.backend.forward(layer, q, k, v, self.kv, self.backend.plan(metadata))

    def last_step(self, layer: AttentionSpec) -> torch.Tensor:
        """What is cached comes in one step, the rest in the next."""
        cached = [(i, 0, cached) for i, (cached, _) in enumerate(self.lengths) if cached]
        if cached:
            self.run(layer, sorted(cached, key=lambda span: span[2] > 1))
        return self.run(layer, [(i, cached, cached + new) for i, (cached, new) in enumerate(self.lengths)])

    def reference(self, layer: AttentionSpec) -> torch.Tensor:
        rows = []
        for (cached, _), tokens in zip(self.lengths, self.tokens, strict=True):
            q, k, v = (part.float() for part in self.split(tokens))
            rows += [_attend_one(layer, q[t], k[: t + 1], v[: t + 1]) for t in range(cached, len(tokens))]
        return torch.stack(rows)


def _attend_one(layer: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query token `[heads, head_size]` over all keys up to its own."""
    out = torch.empty_like(q)
    last = len(k) - 1
    first = 0 if layer.window is None else max(0, last - layer.window + 1)
    for head in range(len(q)):
        kv_head = head * k.shape[1] // len(q)
        scores = k[first:, kv_head] @ q[head] * layer.scale
        if layer.soft_cap is not None:
            scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
        if layer.alibi_slopes is not None:
            scores = scores + layer.alibi_slopes[head] * (torch.arange(first, last + 1) - last)
        out[head] = torch.softmax(scores, dim=0) @ v[first:, kv_head]
    return out


def _spec(
    kind: str = "plain",
    num_kv_heads: int = 2,
    head_size: int = 32,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> KVCacheSpec:
    layer = AttentionSpec(layer=0, scale=head_size**-0.5, **KINDS[kind])
    return KVCacheSpec(
        attention=(layer,),
        num_heads=6,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def _assert_close(spec: KVCacheSpec, lengths: list[tuple[int, int]]) -> None:
    batch = Batch(spec, lengths)
    out, expected = batch.last_step(spec.attention[0]), batch.reference(spec.attention[0])
    assert out.dtype == spec.dtype
    error = (out.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= LIMITS[spec.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BATCHES)
def test_every_batch_and_kind_of_layer_matches_the_reference(name: str, kind: str, dtype: torch.dtype) -> None:
    _assert_close(_spec(kind, dtype=dtype), BATCHES[name])


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("head_size", [32, 64, 80])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_every_shape_of_heads_and_blocks_matches_the_reference(num_kv_heads: int, head_size: int, block_size: int) -> None:
    _assert_close(_spec("plain", num_kv_heads, head_size, block_size), BATCHES["mixture"])


def test_float16_matches_the_reference() -> None:
    _assert_close(_spec(dtype=torch.float16), BATCHES["mixture"])


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_the_cut_into_buckets_and_slices_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "MAX_BUCKET_BYTES", 20_000)
    monkeypatch.setattr(torch_backend, "MAX_BUCKET_PADDING", 6)
    monkeypatch.setattr(torch_backend, "MAX_QUERY_SLICE", 4)
    _assert_close(_spec(kind), [(length, 1) for length in (3, 90, 4, 30, 31, 33, 90)] + [(20, 21), (0, 10)])


def test_layers_of_different_windows_share_a_plan() -> None:
    spec = _spec()
    layers = (spec.attention[0], AttentionSpec(layer=1, scale=0.2, window=3))
    batch = Batch(KVCacheSpec(**{**vars(spec), "attention": layers}), BATCHES["decodes"])
    for layer in layers:
        torch.testing.assert_close(batch.last_step(layer), batch.reference(layer))


def test_unused_slots_are_never_read() -> None:
    # `Batch` fills the cache with NaN, as a sequence whose numbers overflowed would leave it behind.
    batch = Batch(_spec(), BATCHES["mixture"])
    assert not batch.last_step(batch.spec.attention[0]).isnan().any()


def test_copies_read_every_source_before_anything_is_written() -> None:
    backend = TorchAttention(_spec())
    layers = [torch.randn(backend.kv_shape(4)) for _ in range(2)]
    before = [layer.clone() for layer in layers]
    backend.copy_blocks(layers, [(0, 1), (1, 2), (2, 0)])
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer, old[[2, 0, 1, 3]])


def test_swapped_blocks_arrive_in_the_other_cache() -> None:
    backend = TorchAttention(_spec())
    source, destination = torch.randn(backend.kv_shape(3)), torch.zeros(backend.kv_shape(5))
    backend.swap_blocks([source], [destination], [(2, 4), (0, 1)])
    assert torch.equal(destination[[4, 1]], source[[2, 0]])
    assert not destination[[0, 2, 3]].any()


def test_a_dtype_without_attention_is_refused_with_the_reason() -> None:
    assert TorchAttention.supports(_spec()) == ()
    (reason,) = TorchAttention.supports(_spec(dtype=torch.float64))
    assert "float64" in reason
