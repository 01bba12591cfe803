"""`TorchOps`: every operation of a model in plain torch, on any device and in any dtype. It is what always works."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional

from cacheflow.interfaces import CONTRACT_VERSION
from cacheflow.layers.quantization import quantised_linear

if TYPE_CHECKING:
    from cacheflow.interfaces import OpSpec

_TYPICAL_ROWS = 16
"""Rows of a decoding step, which the rearranged form is best for; any number works."""


class TorchOps:
    """Operations between attention calls, a few torch calls each."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    priority: ClassVar[int] = 0

    @classmethod
    def supports(cls, spec: OpSpec) -> tuple[str, ...]:
        """Everything is supported."""
        return ()

    def __init__(self, spec: OpSpec) -> None:
        self._dtype = spec.dtype
        # oneDNN rearranges a bfloat16 weight for the processor's matrix units on every call unless that was done before:
        # [16, 576] by [3072, 576] took 0.93 ms with a plain weight and 0.43 ms with a rearranged one (one core with AMX).
        self._rearranges = spec.device.type == "cpu" and spec.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        if self._rearranges:
            self._rearranges = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """`x @ weight.T + bias`, then `silu_and_mul` if it is gated; quantised weights take a byte each, and are slow."""
        product = self._plain_linear(weight, bias) if form == "plain" else quantised_linear(weight, bias, form, self._dtype)
        return (lambda x: self.silu_and_mul(product(x))) if is_gated else product

    def _plain_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """Bfloat16 weights on a CPU are rearranged once."""
        if not self._rearranges:
            return partial(functional.linear, weight=weight, bias=bias)
        rearranged = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        product = torch.ops.mkldnn._linear_pointwise
        return lambda x: product(x, rearranged, bias, "none", [], "")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalised in float32, rounded to x's dtype, then scaled: the roundings that models were trained with."""
        return functional.rms_norm(x, weight.shape, None, eps) * weight

    def fused_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds, then normalises; both results are new tensors."""
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """LayerNorm over the last axis."""
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head_size: int, is_neox: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns q and k together, as one tensor of all their heads, in q's dtype as the models were trained."""
        num_tokens, q_size = q.shape
        heads = torch.cat((q, k), dim=-1).view(num_tokens, -1, head_size)
        rotary_size = cos_sin.shape[-1]
        cos, sin = cos_sin[positions].to(q.dtype).unsqueeze(1).chunk(2, dim=-1)
        turning, still = heads[..., :rotary_size], heads[..., rotary_size:]
        first, second = turning.chunk(2, dim=-1) if is_neox else (turning[..., ::2], turning[..., 1::2])
        turned = first * cos - second * sin, second * cos + first * sin
        pairs = turned if is_neox else (torch.stack(turned, dim=-1).flatten(-2),)
        both = torch.cat((*pairs, still), dim=-1).flatten(1)
        return both[:, :q_size], both[:, q_size:]

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """`silu` of the first half times the second."""
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up
