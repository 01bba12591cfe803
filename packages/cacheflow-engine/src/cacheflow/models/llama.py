"""Llama and all that shares its shape: RMSNorm, rotary positions, grouped key and value heads, a gated MLP.

It knows neither batches nor blocks, nor where its weights come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from cacheflow.errors import UnsupportedModelError
from cacheflow.interfaces import CONTRACT_VERSION, Attend, AttentionSpec, ModelSpec
from cacheflow.layers import BuildContext, Linear, RMSNorm, Rotary, fused_decoder, rope_max_positions

if TYPE_CHECKING:
    import torch


class Llama:
    """`LlamaForCausalLM`."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    TINY: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 99,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 112,
        "max_position_embeddings": 64,
    }

    @staticmethod
    def spec(hf_config: Mapping[str, Any]) -> ModelSpec:
        """Reads the numbers from a `config.json`."""
        activation = hf_config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(f"Llama is implemented with hidden_act 'silu', not {activation!r}.")
        num_heads = hf_config["num_attention_heads"]
        head_size = hf_config.get("head_dim") or hf_config["hidden_size"] // num_heads
        num_layers = hf_config["num_hidden_layers"]
        return ModelSpec(
            attention=tuple(AttentionSpec(layer=layer, scale=head_size**-0.5) for layer in range(num_layers)),
            num_heads=num_heads,
            num_kv_heads=hf_config.get("num_key_value_heads") or num_heads,
            head_size=head_size,
            hidden_size=hf_config["hidden_size"],
            vocab_size=hf_config["vocab_size"],
            max_model_len=rope_max_positions(hf_config),
        )

    def __init__(self, hf_config: Mapping[str, Any], context: BuildContext) -> None:
        spec = self.spec(hf_config)
        size, eps = spec.hidden_size, hf_config.get("rms_norm_eps", 1e-6)
        self._embedding = context.embedding("model.embed_tokens", spec.vocab_size, size, split=True)
        self._ops, self._rotary = context.ops, context.rotary(hf_config, spec.head_size)
        self._layers = [_Layer(layer, hf_config, spec, context, self._rotary) for layer in range(spec.num_layers)]
        self._norm = context.rms_norm("model.norm", size, eps)
        tied_to = self._embedding if hf_config.get("tie_word_embeddings") else None
        self._head = context.output_head("lm_head", spec.vocab_size, size, tied_to=tied_to)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embedding table's rows."""
        return self._embedding(input_ids)

    @cached_property
    def _fused(self) -> Callable[[torch.Tensor, torch.Tensor, Attend], torch.Tensor] | None:
        """All that `forward` does, as the op provider does it faster; made when the weights are there."""
        return fused_decoder(self._ops, [layer.parts for layer in self._layers], self._norm, self._rotary)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """All layers and the final norm; `hidden` may be overwritten."""
        if self._fused is not None:
            return self._fused(hidden, positions, attend)
        # What the layers have added up so far travels as `residual` beside the latest addend, so that each sum is taken
        # together with the norm that follows it.
        residual = None
        for layer in self._layers:
            hidden, residual = layer(hidden, residual, positions, attend)
        return self._norm.add(hidden, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head."""
        return self._head(hidden)


class _Layer:
    """Attention, then the gated MLP, each behind its norm."""

    def __init__(
        self, layer: int, hf_config: Mapping[str, Any], spec: ModelSpec, context: BuildContext, rotary: Rotary
    ) -> None:
        name, size, inner = f"model.layers.{layer}", spec.hidden_size, hf_config["intermediate_size"]
        q_size, kv_size = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        eps = hf_config.get("rms_norm_eps", 1e-6)
        attention_bias, mlp_bias = hf_config.get("attention_bias", False), hf_config.get("mlp_bias", False)
        self._layer, self._rotary = layer, rotary
        self._attention_norm = context.rms_norm(f"{name}.input_layernorm", size, eps)
        self._qkv = context.linear(
            [f"{name}.self_attn.{part}_proj" for part in "qkv"],
            size,
            [q_size, kv_size, kv_size],
            bias=attention_bias,
            split="column",
            unit=spec.head_size,
        )
        self._out = context.linear(f"{name}.self_attn.o_proj", q_size, size, bias=attention_bias, split="row")
        self._mlp_norm = context.rms_norm(f"{name}.post_attention_layernorm", size, eps)
        self._gate_up = context.linear(
            [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"],
            size,
            [inner, inner],
            bias=mlp_bias,
            split="column",
            is_gated=True,
        )
        self._down = context.linear(f"{name}.mlp.down_proj", inner, size, bias=mlp_bias, split="row")

    @property
    def parts(self) -> tuple[int, RMSNorm, RMSNorm, Linear, Linear, Linear, Linear]:
        """As `fused_decoder` takes them."""
        return self._layer, self._attention_norm, self._mlp_norm, self._qkv, self._out, self._gate_up, self._down

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self._attention_norm.add(x, residual)
        q, k, v = self._qkv(x).split(self._qkv.sizes, dim=-1)
        q, k = self._rotary(q, k, positions)
        x, residual = self._mlp_norm.add(self._out(attend(self._layer, q, k, v)), residual)
        return self._down(self._gate_up(x)), residual
