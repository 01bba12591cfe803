"""GPT-NeoX (arXiv:2204.06745) and Pythia: fused projections head by head, partial rotary positions, parallel residuals.

It knows neither batches nor blocks, nor where its weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn import functional

from cacheflow.errors import UnsupportedModelError
from cacheflow.interfaces import Attend, AttentionSpec, ModelSpec
from cacheflow.layers import BuildContext, Rotary, rope_max_positions

if TYPE_CHECKING:
    import torch


class GPTNeoX:
    """`GPTNeoXForCausalLM`."""

    CONTRACT_VERSION = 1
    TINY: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 99,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 112,
        "max_position_embeddings": 64,
        "rotary_pct": 0.25,
    }

    @staticmethod
    def spec(hf_config: Mapping[str, Any]) -> ModelSpec:
        """Reads the numbers from a `config.json`."""
        activation = hf_config.get("hidden_act", "gelu")
        if activation != "gelu":
            raise UnsupportedModelError(f"GPT-NeoX is implemented with hidden_act 'gelu', not {activation!r}.")
        num_heads, hidden_size = hf_config["num_attention_heads"], hf_config["hidden_size"]
        head_size = hidden_size // num_heads
        layers = range(hf_config["num_hidden_layers"])
        return ModelSpec(
            attention=tuple(AttentionSpec(layer=layer, scale=head_size**-0.5) for layer in layers),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_size=head_size,
            hidden_size=hidden_size,
            vocab_size=hf_config["vocab_size"],
            max_model_len=rope_max_positions(_with_rope_names(hf_config)),
        )

    def __init__(self, hf_config: Mapping[str, Any], context: BuildContext) -> None:
        spec = self.spec(hf_config)
        # Buffers of older checkpoints, which hold no weights; and the head's other name.
        for suffix in (".attention.bias", ".attention.masked_bias"):
            context.ignore(suffix)
        context.alias("lm_head.", "embed_out.")
        rotary = context.rotary(_with_rope_names(hf_config), spec.head_size)
        self._embedding = context.embedding("gpt_neox.embed_in", spec.vocab_size, spec.hidden_size, split=True)
        self._layers = [_Layer(a.layer, hf_config, spec, context, rotary) for a in spec.attention]
        self._norm = context.layer_norm("gpt_neox.final_layer_norm", spec.hidden_size, hf_config.get("layer_norm_eps", 1e-5))
        tied_to = self._embedding if hf_config.get("tie_word_embeddings") else None
        self._head = context.output_head("embed_out", spec.vocab_size, spec.hidden_size, tied_to=tied_to)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embedding table's rows."""
        return self._embedding(input_ids)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """All layers and the final norm."""
        for layer in self._layers:
            hidden = layer(hidden, positions, attend)
        return self._norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head."""
        return self._head(hidden)


class _Layer:
    """Attention and MLP, both fed by the layer's input (or one after the other, as the configuration says)."""

    def __init__(
        self, layer: int, hf_config: Mapping[str, Any], spec: ModelSpec, context: BuildContext, rotary: Rotary
    ) -> None:
        name, size, inner = f"gpt_neox.layers.{layer}", spec.hidden_size, hf_config["intermediate_size"]
        bias, eps = hf_config.get("attention_bias", True), hf_config.get("layer_norm_eps", 1e-5)
        self._layer, self._rotary, self._head_size = layer, rotary, spec.head_size
        self._is_parallel = hf_config.get("use_parallel_residual", True)
        self._attention_norm = context.layer_norm(f"{name}.input_layernorm", size, eps)
        self._mlp_norm = context.layer_norm(f"{name}.post_attention_layernorm", size, eps)
        # One matrix in the checkpoint, whose rows are q, k and v of the first head, then of the second, and so on: a rank's
        # share is a number of whole heads.
        self._qkv = context.linear(
            f"{name}.attention.query_key_value", size, 3 * size, bias=bias, split="column", unit=3 * spec.head_size
        )
        self._out = context.linear(f"{name}.attention.dense", size, size, bias=bias, split="row")
        self._up = context.linear(f"{name}.mlp.dense_h_to_4h", size, inner, bias=True, split="column")
        self._down = context.linear(f"{name}.mlp.dense_4h_to_h", inner, size, bias=True, split="row")

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        qkv = self._qkv(self._attention_norm(x)).unflatten(1, (-1, 3, self._head_size))
        q, k, v = (part.flatten(1) for part in qkv.unbind(2))
        q, k = self._rotary(q, k, positions)
        attended = self._out(attend(self._layer, q, k, v))
        if self._is_parallel:
            return x + attended + self._mlp(x)
        x = x + attended
        return x + self._mlp(x)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(functional.gelu(self._up(self._mlp_norm(x))))


def _with_rope_names(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """GPT-NeoX's own names for its rotary settings, put into those that all other models use."""
    names = {"rope_theta": hf_config.get("rotary_emb_base"), "partial_rotary_factor": hf_config.get("rotary_pct", 0.25)}
    return {**{name: value for name, value in names.items() if value is not None}, **hf_config}
