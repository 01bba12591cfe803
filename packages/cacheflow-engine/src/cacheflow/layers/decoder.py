"""What an op provider is told of a Llama-shaped decoder, so that it can run all of it with fewer calls.

It knows the parts that all layers have; how they are fused is the provider's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cacheflow.interfaces import Attend, AttentionSpec, OpProvider
    from cacheflow.layers.modules import Linear, RMSNorm
    from cacheflow.layers.rotary import Rotary

Run = Callable[["torch.Tensor", "torch.Tensor", "Attend"], "torch.Tensor"]
"""As `Architecture.forward`."""


@dataclass(frozen=True)
class StepAttention:
    """The `Attend` of one step. A fused decoder that knows the backend's plan may attend by itself, given `plan` and `kv`.

    Attributes:
        forward: Of the attention backend.
        layers: The particulars of each layer.
        kv: The cache tensor of each layer.
        plan: What the backend made of the step.
    """

    forward: Callable[..., torch.Tensor]
    layers: Sequence[AttentionSpec]
    kv: Sequence[torch.Tensor]
    plan: Any
    head_size: int

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `Attend`."""
        q, k, v = (rows.view(len(rows), -1, self.head_size) for rows in (q, k, v))
        return self.forward(self.layers[layer], q, k, v, self.kv[layer], self.plan).view(len(q), -1)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer, packed: `x += out(attend(rotary(qkv(norm(x)))))`, then `x += down(gate_up(norm(x)))`.

    Attributes:
        number: In the whole model: what `attend` is called with.
        attention_norm: The weight of the RMSNorm before attention.
        mlp_norm: The weight of the RMSNorm before the MLP.
        qkv: What the provider's `linear` returned, as the following ones.
        out: Behind attention.
        gate_up: Gated.
        down: Behind it.
        sizes: Elements of a row of q, of k and of v.
    """

    number: int
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qkv: Callable[[torch.Tensor], torch.Tensor]
    out: Callable[[torch.Tensor], torch.Tensor]
    gate_up: Callable[[torch.Tensor], torch.Tensor]
    down: Callable[[torch.Tensor], torch.Tensor]
    sizes: tuple[int, ...]


def fused_decoder(
    ops: OpProvider,
    layers: Sequence[tuple[int, RMSNorm, RMSNorm, Linear, Linear, Linear, Linear]],
    norm: RMSNorm,
    rotary: Rotary,
) -> Run | None:
    """The provider's way to run packed layers, or None where it has none, or where ranks add up between the parts.

    Args:
        ops: The provider. `decoder(layers, norm, eps, rotary)` is optional: it returns a `Run` that gives what the single ops
            give, or None. `rotary` has `cos_sin`, `head_size` and `is_neox`.
        layers: Number, norms before attention and MLP, then qkv, out, gate_up and down.
        norm: Behind the last layer.
        rotary: Of all layers.
    """
    make: Any = getattr(ops, "decoder", None)
    if make is None or not layers or any(linear.is_summed for layer in layers for linear in layer[3:]):
        return None
    parts = [
        DecoderLayer(
            number, first.weight, second.weight, qkv.product, out.product, gate_up.product, down.product, tuple(qkv.sizes)
        )
        for number, first, second, qkv, out, gate_up, down in layers
    ]
    run: Run | None = make(parts, norm.weight, norm.eps, rotary)
    return run
