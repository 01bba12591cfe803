"""The engine's attention backends of this package: each owns the layout of its KV cache and calls one family of kernels.

They satisfy the engine's `AttentionBackend` by their shape, for contract version 1, and import nothing of it: what `supports`,
`plan` and `forward` are given are its `KVCacheSpec`, `AttentionMetadata` and `AttentionSpec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from cacheflow_kernels import triton
from cacheflow_kernels.cpu import attention as cpu_attention
from cacheflow_kernels.cuda import attention as cuda_attention
from cacheflow_kernels.cuda import blocks as cuda_blocks


@dataclass(frozen=True)
class TritonPlan:
    """A step's batch as the kernels read it; the fields are those of the engine's metadata."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    num_decodes: int
    max_query_len: int


class TritonAttention:
    """The Triton kernels. A cache tensor is `[num_blocks, 2 (key, value), num_kv_heads, block_size, head_size]`."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 20
    can_be_captured: ClassVar[bool] = True

    @classmethod
    def supports(cls, spec: Any) -> tuple[str, ...]:
        """NVIDIA GPUs of compute capability 8.0 and up, and heads that fit into their shared memory."""
        found = triton.reasons(spec.device, spec.dtype)
        if spec.head_size > triton.MAX_HEAD_SIZE:
            found += (f"head size {spec.head_size} is above {triton.MAX_HEAD_SIZE}",)
        return found

    def __init__(self, spec: Any) -> None:
        from cacheflow_kernels.triton.attention import paged_attention
        from cacheflow_kernels.triton.cache import copy_blocks, store_kv

        self._spec = spec
        self._paged_attention, self._copy_blocks, self._store_kv = paged_attention, copy_blocks, store_kv
        self._slopes: dict[tuple[float, ...], Tensor] = {}

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """A block's keys and values lie together, so that a copy moves one piece of memory."""
        return (num_blocks, 2, self._spec.num_kv_heads, self._spec.block_size, self._spec.head_size)

    def plan(self, metadata: Any, into: TritonPlan | None = None) -> TritonPlan:
        """The metadata's own tensors, or those of `into` with the new batch in them.

        Raises:
            ValueError: The batch does not fit into the launches that were planned for `into`.
        """
        if into is None:
            return TritonPlan(**{field.name: getattr(metadata, field.name) for field in fields(TritonPlan)})
        width = metadata.block_tables.shape[1]
        same_sizes = len(metadata.seq_lens) == len(into.seq_lens) and len(metadata.slot_mapping) == len(into.slot_mapping)
        has_launches = metadata.num_decodes == 0 or into.num_decodes > 0
        has_launches &= metadata.max_query_len == 1 or into.max_query_len > 1
        if not (same_sizes and has_launches and width <= into.block_tables.shape[1]):
            raise ValueError(
                f"A batch of {len(metadata.seq_lens)} sequences ({metadata.num_decodes} decodes), {len(metadata.slot_mapping)} "
                f"tokens and {width} blocks a sequence can't refill a plan for {len(into.seq_lens)} sequences "
                f"({into.num_decodes} decodes), {len(into.slot_mapping)} tokens"
                f" and {into.block_tables.shape[1]} blocks: plan it anew."
            )
        into.query_start_loc.copy_(metadata.query_start_loc)
        into.seq_lens.copy_(metadata.seq_lens)
        into.block_tables[:, :width].copy_(metadata.block_tables)
        into.slot_mapping.copy_(metadata.slot_mapping)
        return into

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, plan: TritonPlan) -> Tensor:
        """Stores, then attends: at most four launches."""
        self.store(k, v, kv, plan.slot_mapping)
        return self.attend(layer, q, kv, plan)

    def store(self, k: Tensor, v: Tensor, kv: Tensor, slot_mapping: Tensor) -> None:
        """Writes keys and values at their slots."""
        self._store_kv(k, v, kv[:, 0], kv[:, 1], slot_mapping)

    def attend(self, layer: Any, q: Tensor, kv: Tensor, plan: TritonPlan) -> Tensor:
        """Attention to what is stored already."""
        return self._paged_attention(
            q,
            kv[:, 0],
            kv[:, 1],
            plan.block_tables,
            plan.seq_lens,
            plan.query_start_loc,
            layer.scale,
            layer.window,
            self.slopes(layer),
            layer.soft_cap,
            plan.max_query_len,
            plan.num_decodes,
        )

    def copy_blocks(self, kv: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """Two launches for all layers."""
        if pairs and kv:
            self._copy_blocks(kv, _pinned(pairs))

    def swap_blocks(self, source: Sequence[Tensor], destination: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """One gather, one transfer and one scatter a layer."""
        _swap_blocks(source, destination, pairs)

    def slopes(self, layer: Any) -> Tensor | None:
        """A layer's ALiBi slopes on the device, `[num_heads] float32`, made once."""
        slopes = layer.alibi_slopes
        if slopes is None:
            return None
        if slopes not in self._slopes:
            self._slopes[slopes] = torch.tensor(slopes, dtype=torch.float32, device=self._spec.device)
        return self._slopes[slopes]


class CudaAttention:
    """Decodes through the CUDA kernel, prompt chunks through Triton's; the cache is laid out as `TritonAttention`'s."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 30
    can_be_captured: ClassVar[bool] = True

    @classmethod
    def supports(cls, spec: Any) -> tuple[str, ...]:
        """NVIDIA GPUs of compute capability 8.0 and up, with the head and block sizes that the kernel is compiled for."""
        found = cuda_attention.reasons(spec.device, spec.dtype)
        if spec.head_size not in cuda_attention.HEAD_SIZES:
            found += (f"head size {spec.head_size} is not among {', '.join(map(str, cuda_attention.HEAD_SIZES))}",)
        if spec.block_size & (spec.block_size - 1):
            found += (f"block size {spec.block_size} is no power of two",)
        return found

    def __init__(self, spec: Any) -> None:
        from cacheflow_kernels.triton.prefill import paged_prefill

        self._spec = spec
        self._paged_prefill = paged_prefill
        self._triton = TritonAttention(spec)
        self.kv_shape = self._triton.kv_shape
        self.plan = self._triton.plan

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, plan: TritonPlan) -> Tensor:
        """Stores, then attends: at most four launches."""
        spec, k_cache, v_cache = self._spec, kv[:, 0], kv[:, 1]
        cuda_blocks.store_kv(k, v, k_cache, v_cache, plan.slot_mapping)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        slopes = self._triton.slopes(layer)
        tensors = (q, k_cache, v_cache, plan.block_tables, plan.seq_lens, plan.query_start_loc, out)
        if plan.num_decodes:
            # Each layer's own, so that captured steps of all sizes share what is freed in between.
            num_seqs, max_blocks = plan.block_tables.shape
            max_seq_len = max_blocks * spec.block_size
            workspace = cuda_attention.Workspace.make(num_seqs, spec.num_heads, spec.head_size, max_seq_len, spec.device)
            cuda_attention.paged_decode(*tensors, layer.scale, layer.window, slopes, layer.soft_cap, workspace)
        if plan.max_query_len > 1:
            window = cuda_attention.NO_WINDOW if layer.window is None else min(layer.window, cuda_attention.NO_WINDOW)
            self._paged_prefill(*tensors, layer.scale, window, slopes, layer.soft_cap)
        return out

    def copy_blocks(self, kv: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """One launch for all layers, unless a block is both read and written."""
        if pairs and kv:
            cuda_blocks.copy_blocks(kv, _pinned(pairs))

    def swap_blocks(self, source: Sequence[Tensor], destination: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """A copy by the driver for each run of consecutive blocks; it returns when all are done."""
        if pairs and source:
            cuda_blocks.swap_all(source, destination, torch.tensor(pairs, dtype=torch.int64))


class CpuAttention:
    """The C++ kernels. A cache tensor is `[num_blocks, 2 (key, value), num_kv_heads, block_size, head_size]`."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 10

    @classmethod
    def supports(cls, spec: Any) -> tuple[str, ...]:
        """CPUs that the library was compiled for, and heads that fit into the kernels' buffers."""
        found = cpu_attention.supports(spec.device, spec.dtype)
        if spec.head_size > cpu_attention.MAX_HEAD_SIZE:
            found += (f"head size {spec.head_size} is above {cpu_attention.MAX_HEAD_SIZE}",)
        return found

    def __init__(self, spec: Any) -> None:
        self._spec = spec
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_size, spec.block_size)
        self._slopes = {layer.layer: _cpu_slopes(layer.alibi_slopes) for layer in spec.attention}
        self._layers = {
            layer.layer: cpu_attention.Layer.of(
                sizes, spec.dtype, layer.scale, layer.window, self._slopes[layer.layer], layer.soft_cap
            )
            for layer in spec.attention
        }

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """A head's keys in a block lie one after the other, as do its values: decodes read whole pages."""
        return (num_blocks, 2, self._spec.num_kv_heads, self._spec.block_size, self._spec.head_size)

    def plan(self, metadata: Any, into: Any = None) -> cpu_attention.Plan:
        """Nothing but addresses: the kernel divides the work itself. There are no graphs to refill `into` for."""
        tensors = (
            metadata.query_start_loc.contiguous(),
            metadata.seq_lens.contiguous(),
            metadata.block_tables.contiguous(),
        )
        batch = cpu_attention.Batch.of(*tensors)
        return cpu_attention.Plan(batch, tensors, metadata.slot_mapping.contiguous(), self._layers)

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, plan: cpu_attention.Plan) -> Tensor:
        """Stores, then attends. A decoder of this package does both by itself: see `cpu.decoder`."""
        particulars, cache = self._layers[layer.layer], cpu_attention.cache_of(kv)
        cpu_attention.store(particulars, k, v, cache, plan.slot_mapping)
        return cpu_attention.attend(particulars, q, cache, plan.batch)

    def copy_blocks(self, kv: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """All sources of a layer are read before any of its destinations is written."""
        if pairs:
            cpu_attention.copy_blocks(kv, torch.tensor(pairs, dtype=torch.int64))

    def swap_blocks(self, source: Sequence[Tensor], destination: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """One gather and one scatter a layer."""
        _swap_blocks(source, destination, pairs)


def _swap_blocks(source: Sequence[Tensor], destination: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    if not pairs:
        return
    read, written = (list(blocks) for blocks in zip(*pairs, strict=True))
    for origin, target in zip(source, destination, strict=True):
        target[written] = origin[read].to(target.device)


def _pinned(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """In memory from which a GPU takes it without the host's waiting."""
    return torch.tensor(pairs, dtype=torch.int64, pin_memory=torch.cuda.is_available())


def _cpu_slopes(alibi_slopes: tuple[float, ...] | None) -> Tensor | None:
    return None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
