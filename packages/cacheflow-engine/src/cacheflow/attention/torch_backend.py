"""Paged attention (arXiv:2309.06180) in plain torch: the engine's own backend, on any device, in any shape.

It owns the layout of the KV cache, `[num_blocks, block_size, 2 (key, value), num_kv_heads, head_size]`, and how a batch is
cut into calls of torch's attention. It knows no scheduler, no model and nothing of how blocks are handed out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from cacheflow.interfaces import AttentionMetadata, AttentionSpec, KVCacheSpec

# The figures below: 64 decodes of 40 to 500 tokens (264 on average), 9 query and 3 KV heads of 64, bfloat16, two cores with
# AVX-512 and AMX, milliseconds a layer. As one padded batch, gathering took 0.6 into a reused buffer and 5.8 into a fresh one
# (page faults); then SDPA on the gathered rows as they lie took 1.3, matmul and softmax 3.3 in bfloat16 (it copies its strided
# operands) and 9.1 in float32. A call per sequence took 3.4. Query heads folded into the query axis beat `enable_gqa` by 12 to
# 48 %. All of `forward`: 2.95 as one batch, 1.5 sorted by length and cut into 8 buckets that stay in the second-level cache.
MAX_BUCKET_BYTES = 2 << 20
"""Gathered keys and values of one bucket of decodes: as much as a core's cache holds."""
MAX_BUCKET_PADDING = 512
"""Padding tokens of a bucket. The fixed cost of one more bucket, about 30 µs, equals attending to some 600 tokens."""
MAX_QUERY_SLICE = 256
"""Query tokens of one masked call. 2,048 behind as many cached ones took 47 ms a layer (one core) in slices of 256, 50 in
slices of 128, 103 in slices of 512 and 112 in one: a slice skips the keys that lie after it."""


@dataclass(frozen=True)
class _Decodes:
    """Sequences of one query token and similar lengths, attended to in one call.

    Attributes:
        start: The first one's place among the decodes in sorted order.
        stop: The place after the last one's.
        slots: `[num_seqs * num_keys] int64`: where each key lies. Padding repeats a sequence's own last token, so that what
            lies in unused slots is never read.
        gathered: The part of the backend's buffer that takes them, `[num_seqs * num_keys, 2 * num_kv_heads * head_size]`.
        keys: A view of it, `[num_seqs, num_kv_heads, num_keys, head_size]`.
        values: Likewise.
        offsets: `[num_seqs, 1, 1, num_keys] float32`: key position minus query position; -inf: padding.
        mask: Zeros and -inf as `offsets` says, in the cache's dtype; None without padding.
    """

    start: int
    stop: int
    slots: torch.Tensor
    gathered: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Chunk:
    """Several query tokens of one sequence.

    Attributes:
        start: Its first query token's row.
        stop: The row after its last one's.
        num_cached: Tokens before them.
        slots: `[num_cached + num_queries] int64`: where each key lies; None when nothing comes before them.
    """

    start: int
    stop: int
    num_cached: int
    slots: torch.Tensor | None


@dataclass(frozen=True)
class _WindowedDecodes:
    """The decodes of a batch as layers of one window see them: their order by length, its inverse, and the buckets."""

    order: torch.Tensor
    inverse: torch.Tensor
    buckets: tuple[_Decodes, ...]


@dataclass(frozen=True)
class _Plan:
    """What a step's layers share. Layers of different windows read different keys, hence decodes per window."""

    slot_mapping: torch.Tensor
    num_decodes: int
    decodes: dict[int | None, _WindowedDecodes]
    chunks: tuple[_Chunk, ...]


class TorchAttention:
    """Paged attention on torch's `scaled_dot_product_attention`."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 0

    @classmethod
    def supports(cls, spec: KVCacheSpec) -> tuple[str, ...]:
        """Everything but a dtype that torch has no attention for."""
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return (f"needs float32, float16 or bfloat16, not {spec.dtype}",)
        return ()

    def __init__(self, spec: KVCacheSpec) -> None:
        self._spec = spec
        self._gathered = torch.empty(0, 2 * spec.num_kv_heads * spec.head_size, dtype=spec.dtype, device=spec.device)
        self._staircases: dict[int | None, torch.Tensor] = {}
        self._slopes: dict[tuple[float, ...], torch.Tensor] = {}

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """`(num_blocks, block_size, 2, num_kv_heads, head_size)`: one gather reads a token's key and value."""
        return (num_blocks, self._spec.block_size, 2, self._spec.num_kv_heads, self._spec.head_size)

    def plan(self, metadata: AttentionMetadata, into: Any = None) -> _Plan:
        """Buckets follow the lengths, so every step's plan is new: `into` is not refilled."""
        starts, lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        num_decodes = metadata.num_decodes
        chunks = []
        for i in range(num_decodes, len(lens)):
            num_cached = lens[i] - (starts[i + 1] - starts[i])
            slots = None
            if num_cached:
                positions = torch.arange(lens[i], device=self._spec.device)
                slots = self._slots(metadata.block_tables[i : i + 1], positions[None]).flatten()
            chunks.append(_Chunk(starts[i], starts[i + 1], num_cached, slots))
        decodes = {}
        if num_decodes:
            decode_lens, block_tables = metadata.seq_lens[:num_decodes].to(torch.int64), metadata.block_tables[:num_decodes]
            windows = {layer.window for layer in self._spec.attention}
            decodes = {window: self._plan_decodes(decode_lens, block_tables, window) for window in windows}
        return _Plan(metadata.slot_mapping, num_decodes, decodes, tuple(chunks))

    def forward(
        self, layer: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, plan: _Plan
    ) -> torch.Tensor:
        """Stores, then attends: decodes in buckets, prompt chunks one by one."""
        slots, by_token = plan.slot_mapping, kv.flatten(0, 1)
        by_token[:, 0].index_copy_(0, slots, k)
        by_token[:, 1].index_copy_(0, slots, v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if plan.num_decodes:
            rows = slice(plan.num_decodes)
            self._attend_decodes(layer, q[rows], by_token, plan.decodes[layer.window], out[rows])
        for chunk in plan.chunks:
            rows = slice(chunk.start, chunk.stop)
            self._attend_chunk(layer, q[rows], k[rows], v[rows], by_token, chunk, out[rows])
        return out

    def copy_blocks(self, kv: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """Indexing reads all sources into a new tensor before anything is written."""
        self.swap_blocks(kv, kv, pairs)

    def swap_blocks(
        self, source: Sequence[torch.Tensor], destination: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """One gather, one transfer and one scatter a layer."""
        if not pairs:
            return
        read, written = (list(blocks) for blocks in zip(*pairs, strict=True))
        for origin, target in zip(source, destination, strict=True):
            target[written] = origin[read].to(target.device)

    def _slots(self, block_tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at `positions [num_seqs, n]` lie, `[num_seqs, n] int64`."""
        size = self._spec.block_size
        blocks = block_tables.gather(1, positions // size)
        return blocks.to(torch.int64) * size + positions % size

    def _plan_decodes(self, lens: torch.Tensor, block_tables: torch.Tensor, window: int | None) -> _WindowedDecodes:
        """Sorts the decodes by the keys that they see and cuts the order into buckets."""
        num_keys = lens if window is None else lens.clamp(max=window)
        order = torch.argsort(num_keys, descending=True, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        buckets = []
        for start, stop, longest in self._cut(num_keys[order].tolist()):
            rows = order[start:stop]
            last = (lens[rows] - 1)[:, None]
            positions = torch.arange(longest, device=lens.device) + (lens[rows] - num_keys[rows])[:, None]
            slots = self._slots(block_tables[rows], torch.minimum(positions, last)).flatten()
            is_padding = positions > last
            offsets = (positions - last).float().masked_fill_(is_padding, -math.inf)[:, None, None]
            mask = None
            if bool(is_padding.any()):
                mask = torch.zeros(is_padding.shape, dtype=self._spec.dtype, device=lens.device)
                mask = mask.masked_fill_(is_padding, -math.inf)[:, None, None]
            buckets.append(_Decodes(start, stop, slots, *self._buffer(len(slots), stop - start), offsets, mask))
        return _WindowedDecodes(order, inverse, tuple(buckets))

    def _cut(self, lens: list[int]) -> Iterator[tuple[int, int, int]]:
        """Cuts descending lengths into runs of similar ones: (start, stop, length of the longest)."""
        token_bytes = self._gathered.shape[1] * self._gathered.element_size()
        start = padding = 0
        for i, length in enumerate(lens):
            longest = lens[start]
            padding += longest - length
            too_large = (i - start + 1) * longest * token_bytes > MAX_BUCKET_BYTES
            if i > start and (padding > MAX_BUCKET_PADDING or too_large):
                yield start, i, longest
                start, padding = i, 0
        yield start, len(lens), lens[start]

    def _buffer(self, num_keys: int, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first rows of the reused buffer, and its keys and values as `[num_seqs, num_kv_heads, keys, head_size]`."""
        if len(self._gathered) < num_keys:
            self._gathered = self._gathered.new_empty(num_keys, self._gathered.shape[1])
        rows = self._gathered[:num_keys]
        both = rows.view(num_seqs, -1, 2, self._spec.num_kv_heads, self._spec.head_size).transpose(1, 3)
        return rows, both[:, :, 0], both[:, :, 1]

    def _attend_decodes(
        self, layer: AttentionSpec, q: torch.Tensor, by_token: torch.Tensor, decodes: _WindowedDecodes, out: torch.Tensor
    ) -> None:
        # [n, kv heads, queries per kv head, head size]: one read of a KV head serves all its query heads.
        folded = q.index_select(0, decodes.order).unflatten(1, (self._spec.num_kv_heads, -1))
        rows = by_token.flatten(1)
        outs = []
        for bucket in decodes.buckets:
            torch.index_select(rows, 0, bucket.slots, out=bucket.gathered)
            bias = bucket.mask
            if layer.alibi_slopes is not None:
                bias = (self._alibi(layer.alibi_slopes) * bucket.offsets).to(q.dtype)
                bias = bias.unflatten(1, folded.shape[1:3]).squeeze(3)
            outs.append(_attend(folded[bucket.start : bucket.stop], bucket.keys, bucket.values, bias, layer))
        torch.index_select(torch.cat(outs).flatten(1, 2), 0, decodes.inverse, out=out)

    def _attend_chunk(
        self,
        layer: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        by_token: torch.Tensor,
        chunk: _Chunk,
        out: torch.Tensor,
    ) -> None:
        is_plain = layer.window is None and layer.alibi_slopes is None and layer.soft_cap is None
        if chunk.slots is None:
            keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
            if is_plain:
                queries = q.transpose(0, 1)[None]
                result = F.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, scale=layer.scale, enable_gqa=True
                )
                out.copy_(result[0].transpose(0, 1))
                return
        else:
            gathered, keys, values = self._buffer(len(chunk.slots), 1)
            torch.index_select(by_token.flatten(1), 0, chunk.slots, out=gathered)
        for start in range(0, len(q), MAX_QUERY_SLICE):
            stop = min(start + MAX_QUERY_SLICE, len(q))
            first, end = chunk.num_cached + start, chunk.num_cached + stop
            seen = slice(0 if layer.window is None else max(0, first - layer.window + 1), end)
            bias = self._chunk_bias(layer, stop - start, first - seen.start)
            queries = q[start:stop].transpose(0, 1)[None]
            result = _attend(queries, keys[:, :, seen], values[:, :, seen], bias, layer)
            out[start:stop] = result[0].transpose(0, 1)

    def _chunk_bias(self, layer: AttentionSpec, num_queries: int, num_before: int) -> torch.Tensor:
        """What is added to the scores of queries behind `num_before` keys: `[1, 1 or num_heads, num_queries, num_keys]`."""
        mask = self._staircase(layer.window, num_queries, num_before)[None, None]
        if layer.alibi_slopes is None:
            return mask
        keys = torch.arange(-num_before, num_queries, device=mask.device)
        distances = keys - torch.arange(num_queries, device=mask.device)[:, None]
        return (self._alibi(layer.alibi_slopes) * distances + mask).to(mask.dtype)

    def _staircase(self, window: int | None, num_queries: int, num_before: int) -> torch.Tensor:
        """Zeros where query i may see key j, i.e. `i + num_before - window < j <= i + num_before`, and -inf elsewhere.

        It depends on `j - num_before - i` only, so that every slice's mask is a view into one that is kept.
        """
        kept = self._staircases.get(window)
        if kept is None or kept.shape[1] - MAX_QUERY_SLICE < num_before:
            behind = 1 << max(10, (num_before - 1).bit_length())
            ahead = torch.arange(-behind, MAX_QUERY_SLICE, device=self._spec.device)
            ahead = ahead - torch.arange(MAX_QUERY_SLICE, device=self._spec.device)[:, None]
            hidden = ahead > 0
            if window is not None:
                hidden |= ahead <= -window
            kept = torch.zeros(ahead.shape, dtype=self._spec.dtype, device=self._spec.device)
            self._staircases[window] = kept.masked_fill_(hidden, -math.inf)
        behind = kept.shape[1] - MAX_QUERY_SLICE
        return self._staircases[window][:num_queries, behind - num_before : behind + num_queries]

    def _alibi(self, slopes: tuple[float, ...]) -> torch.Tensor:
        """`[1, num_heads, 1, 1] float32`."""
        if slopes not in self._slopes:
            tensor = torch.tensor(slopes, dtype=torch.float32, device=self._spec.device)
            self._slopes[slopes] = tensor.view(1, -1, 1, 1)
        return self._slopes[slopes]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, layer: AttentionSpec) -> torch.Tensor:
    """Attention of `q [n, h, num_queries, head_size]` to `k`, `v [n, num_kv_heads, num_keys, head_size]`, shaped like q.

    Torch's own attention has no soft cap: those layers multiply in float32.
    """
    if layer.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=layer.scale, enable_gqa=q.shape[1] != k.shape[1])
    num_kv_heads, num_queries = k.shape[1], q.shape[2]
    grouped = q.float().unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    scores = torch.matmul(grouped, k.float().transpose(-1, -2)).mul_(layer.scale)
    scores = scores.div_(layer.soft_cap).tanh_().mul_(layer.soft_cap)
    if bias is not None:
        by_query = scores.unflatten(2, (-1, num_queries))
        by_query += bias.unflatten(1, (num_kv_heads, -1)) if bias.shape[1] == q.shape[1] else bias[:, :, None]
    return torch.matmul(torch.softmax(scores, dim=-1), v.float()).view(q.shape).to(q.dtype)
