"""The group `cacheflow.op_providers`: the operations of a model between its attention calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Where and in which dtype the operations of a model will run."""

    dtype: torch.dtype
    device: torch.device


LINEAR_FORMS = ("plain", "int8", "int4", "int8_dynamic")
"""How `OpProvider.linear` keeps a weight: in the spec's dtype; as integers of 8 bits, or of 4 with a minimum, with a float16
scale for each `QUANTISATION_GROUP` inputs of an output; as bytes with one scale for each output, to be multiplied by rows that
are themselves rounded to bytes, each with a scale of its own."""

QUANTISATION_GROUP = 32
"""Inputs that share a scale in the forms "int8" and "int4": GGUF's Q8_0, Q4_0 and Q4_1 have the same. A last group may be
shorter."""


class OpProvider(Protocol):
    """The operations between attention calls. Inputs are contiguous in the last axis; outputs are new tensors unless said.

    A provider may have three methods more: `decoder`, which runs all layers of a Llama-shaped model (see `layers.decoder`),
    `row_maxima`, which greedy sampling asks (see `sampling.sampler.row_maxima`), and `draw_rows`, which random sampling asks
    (see `sampling.sampler.DrawRows`).
    """

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]

    @classmethod
    def supports(cls, spec: OpSpec) -> tuple[str, ...]:
        """Why this provider can't serve `spec` on this machine."""
        ...

    def __init__(self, spec: OpSpec) -> None: ...

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Packs `weight [out_features, in_features]`, once, and keeps only what it packed.

        Args:
            weight: In the spec's dtype; in other forms than "plain" any floating-point dtype.
            bias: `[out_features]` in the spec's dtype, or None.
            form: One of `LINEAR_FORMS`. A provider without a fast way takes a slow one.
            is_gated: The first half of the outputs are gates, the second half what they let through, and the result is
                `silu(first half) * second half`; what is rounded in between is the provider's choice.

        Returns:
            A function from `[num_rows, in_features]` to `[num_rows, out_features]`, gated half as many, in the spec's dtype.
        """
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm (arXiv:1910.07467) over the last axis: computed in float32, rounded to x's dtype, then times the weight.

        Where it rounds decides bfloat16 tokens: models are trained and published with this order.
        """
        ...

    def fused_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(rms_norm(x + residual), x + residual)`; either input may be overwritten."""
        ...

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """LayerNorm over the last axis."""
        ...

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head_size: int, is_neox: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary position embedding (arXiv:2104.09864); q and k may be overwritten.

        Cosines and sines are rounded to q's dtype, and the products are taken in it.

        Args:
            q: `[num_tokens, num_heads * head_size]`, rows may be strided.
            k: `[num_tokens, num_kv_heads * head_size]`, rows may be strided.
            positions: `[num_tokens] int64`.
            cos_sin: `[max_positions, rotary_size] float32`: cosines in the first half, sines in the second.
            head_size: Elements of one head; the first `rotary_size` of them turn.
            is_neox: Pairs are (i, i + rotary_size / 2); otherwise (2i, 2i + 1).
        """
        ...

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, 2 * size]` → `silu(x[:, :size]) * x[:, size:]`."""
        ...
