"""The group `cacheflow.attention_backends`: paged attention: its KV layout, a batch as it sees it, and what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cacheflow.interfaces.models import AttentionSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What an attention backend is asked to support and to lay out.

    Attributes:
        attention: One entry per layer that this rank owns.
        num_heads: Query heads of this rank.
        num_kv_heads: Key and value heads of this rank.
        head_size: Elements of one head.
        block_size: Token slots of one block.
        dtype: Of keys and values.
        device: Where they live.
    """

    attention: tuple[AttentionSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The shape of one step's batch. Sequences with one query token come first.

    Attributes:
        query_start_loc: `[num_seqs + 1] int32`: sequence i's query tokens are the rows from `query_start_loc[i]` up to
            `query_start_loc[i + 1]`.
        seq_lens: `[num_seqs] int32`: tokens in the cache once this step is stored, its query tokens included.
        block_tables: `[num_seqs, max_num_blocks] int32`: token t of a sequence lies in block `block_tables[i, t // block_size]`
            at slot `t % block_size`; unused entries are -1.
        slot_mapping: `[num_tokens] int64`: `block * block_size + slot` where each query token is stored; all distinct.
        num_decodes: How many of the first sequences have exactly one query token.
        max_query_len: Most query tokens of one sequence.
        max_seq_len: Most tokens of one sequence.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int


class AttentionBackend(Protocol):
    """Paged attention over a KV cache whose layout it owns. One instance serves all layers of a rank.

    The runner makes one tensor of `kv_shape` per layer, calls `copy_blocks` for the step's copies, then `plan` once and
    `forward` once a layer.

    A backend may have `can_be_captured = True`. It promises that `plan` refills `into`, that `forward` reads nothing back from
    the device, and that what it launches for decodes depends on shapes alone: then steps of decodes are captured in CUDA
    graphs, each for its number of sequences and width of block tables.
    """

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]
    """Of several that support a spec, `auto` takes the one with the highest."""

    @classmethod
    def supports(cls, spec: KVCacheSpec) -> tuple[str, ...]:
        """Why this backend can't serve `spec` on this machine."""
        ...

    def __init__(self, spec: KVCacheSpec) -> None: ...

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of one layer's cache tensor, of the spec's dtype, holding keys and values of `num_blocks` blocks."""
        ...

    def plan(self, metadata: AttentionMetadata, into: Any = None) -> Any:
        """Whatever `forward` wants to have prepared once per step.

        Args:
            metadata: This step's batch.
            into: An earlier plan for a batch of the same shape, whose tensors are to be refilled (CUDA graphs).
        """
        ...

    def forward(
        self, layer: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, plan: Any
    ) -> torch.Tensor:
        """Stores k and v at their slots, then attends causally.

        Args:
            layer: The layer's particulars.
            q: `[num_tokens, num_heads, head_size]`, contiguous in the last axis.
            k: `[num_tokens, num_kv_heads, head_size]`, contiguous in the last axis.
            v: Like `k`.
            kv: The layer's cache tensor; written in place.
            plan: What `plan` made of this step.

        Returns:
            `[num_tokens, num_heads, head_size]` in q's dtype.
        """
        ...

    def copy_blocks(self, kv: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) in every layer, as if all sources were read before any write."""
        ...

    def swap_blocks(
        self, source: Sequence[torch.Tensor], destination: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies whole blocks from one set of cache tensors to another, which may live on another device."""
        ...
