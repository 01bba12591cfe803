"""The engine's op providers of this package: the operations between attention calls, each family of kernels as one class.

They satisfy the engine's `OpProvider` by their shape, for contract version 1, and import nothing of it: what `supports` and the
constructor are given is its `OpSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from cacheflow_kernels import reference, triton
from cacheflow_kernels.cpu import decoder as cpu_decoder
from cacheflow_kernels.cpu import linear as cpu_linear
from cacheflow_kernels.cuda import rows as cuda_rows

QUANTISATION_GROUP = 32
"""Inputs that share a scale, by the engine's contract."""


def _torch_linear(
    weight: Tensor, bias: Tensor | None, form: str, is_gated: bool, silu_and_mul: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Plain matrices by torch, unpacked; quantised ones by the reference, which is slow: there are no kernels for them."""
    if form != "plain":
        return reference.linear(weight, bias, form, QUANTISATION_GROUP, is_gated)
    product: Callable[[Tensor], Tensor] = partial(functional.linear, weight=weight, bias=bias)
    return (lambda x: silu_and_mul(product(x))) if is_gated else product


class CpuOps:
    """C++ on x86 processors with AVX2 or more: packed matrix products, fused norms, rotary embedding and activation."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 10

    @classmethod
    def supports(cls, spec: Any) -> tuple[str, ...]:
        """CPUs, float32 and bfloat16, where the kernels were compiled."""
        return cpu_linear.supports(spec.device, spec.dtype)

    def __init__(self, spec: Any) -> None:
        from cacheflow_kernels.cpu import rows

        self._dtype: torch.dtype = spec.dtype
        self.rms_norm = rows.rms_norm
        self.fused_add_rms_norm = rows.fused_add_rms_norm
        self.layer_norm = rows.layer_norm
        self.rotary = rows.rotary
        self.silu_and_mul = rows.silu_and_mul
        self.row_maxima = rows.row_maxima
        self.draw_rows = rows.draw_rows

    def linear(
        self, weight: Tensor, bias: Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """`x @ weight.T + bias`, gated in the same pass; only the packed weight is kept."""
        return cpu_linear.linear(weight, bias, form, QUANTISATION_GROUP, is_gated, self._dtype)

    def decoder(
        self, layers: Sequence[Any], norm: Tensor, eps: float, rotary: Any
    ) -> Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor] | None:
        """One call between two attention calls; bit for bit what the single ops give."""
        return cpu_decoder.decoder(layers, norm, eps, rotary)


class TritonOps:
    """Fused norms, rotary embedding and activation in Triton; matrix products by torch, which calls cuBLAS."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 20

    @classmethod
    def supports(cls, spec: Any) -> tuple[str, ...]:
        """NVIDIA GPUs of compute capability 8.0 and up."""
        return triton.reasons(spec.device, spec.dtype)

    def __init__(self, spec: Any) -> None:
        from cacheflow_kernels.triton import activations, norms, rotary

        self.rms_norm = norms.rms_norm
        self.fused_add_rms_norm = norms.fused_add_rms_norm
        self.layer_norm = norms.layer_norm
        self.rotary = rotary.rotary
        self.silu_and_mul: Callable[[Tensor], Tensor] = activations.silu_and_mul

    def linear(
        self, weight: Tensor, bias: Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """As `_torch_linear`."""
        return _torch_linear(weight, bias, form, is_gated, self.silu_and_mul)


class CudaOps:
    """RMSNorm, rotary embedding and activation in CUDA C++; layer norm and matrix products by torch."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 30

    @classmethod
    def supports(cls, spec: Any) -> tuple[str, ...]:
        """NVIDIA GPUs of compute capability 8.0 and up, where the package was installed with nvcc."""
        return cuda_rows.reasons(spec.device, spec.dtype)

    def __init__(self, spec: Any) -> None:
        self.rms_norm = cuda_rows.rms_norm
        self.fused_add_rms_norm = cuda_rows.fused_add_rms_norm
        self.rotary = cuda_rows.rotary
        self.silu_and_mul: Callable[[Tensor], Tensor] = cuda_rows.silu_and_mul

    def linear(
        self, weight: Tensor, bias: Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """As `_torch_linear`."""
        return _torch_linear(weight, bias, form, is_gated, self.silu_and_mul)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """LayerNorm over the last axis."""
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
