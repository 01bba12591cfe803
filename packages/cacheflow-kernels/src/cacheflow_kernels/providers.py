"""The engine's op providers of this package: the operations between attention calls, each family of kernels as one class.

They satisfy the engine's `OpProvider` by their shape, for contract version 1, and import nothing of it: what `supports` and the
constructor are given is its `OpSpec`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from cacheflow_kernels import triton
from cacheflow_kernels.cpu import linear as cpu_linear
from cacheflow_kernels.cuda import rows as cuda_rows


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

        self.rms_norm = rows.rms_norm
        self.fused_add_rms_norm = rows.fused_add_rms_norm
        self.layer_norm = rows.layer_norm
        self.rotary = rows.rotary
        self.silu_and_mul = rows.silu_and_mul

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`x @ weight.T + bias`; only the packed weight is kept."""
        return cpu_linear.linear(weight, bias, form="plain", group_size=0, is_gated=False)


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
        self.silu_and_mul = activations.silu_and_mul

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`x @ weight.T + bias`; nothing is packed."""
        return partial(functional.linear, weight=weight, bias=bias)


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
        self.silu_and_mul = cuda_rows.silu_and_mul

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`x @ weight.T + bias`; nothing is packed."""
        return partial(functional.linear, weight=weight, bias=bias)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """LayerNorm over the last axis."""
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
