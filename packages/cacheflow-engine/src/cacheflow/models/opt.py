"""OPT (arXiv:2205.01068), all sizes: LayerNorm, learned positions, a ReLU MLP.

The 350m differs from the others: it norms behind each part instead of before it, has no final norm, and its embeddings are
narrower than its hidden states. It knows neither batches nor blocks, nor where its weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cacheflow.errors import UnsupportedModelError
from cacheflow.interfaces import CONTRACT_VERSION, Attend, AttentionSpec, ModelSpec
from cacheflow.layers import BuildContext

if TYPE_CHECKING:
    import torch

_POSITION_OFFSET = 2
"""The table of positions has two rows in front that the model never uses."""
_EPS = 1e-5


class OPT:
    """`OPTForCausalLM`."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    TINY: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 99,
        "hidden_size": 64,
        "word_embed_proj_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 112,
        "max_position_embeddings": 64,
    }

    @staticmethod
    def spec(hf_config: Mapping[str, Any]) -> ModelSpec:
        """Reads the numbers from a `config.json`."""
        for setting, implemented in (("activation_function", "relu"), ("layer_norm_elementwise_affine", True)):
            value = hf_config.get(setting, implemented)
            if value != implemented:
                raise UnsupportedModelError(f"OPT is implemented with {setting} {implemented!r}, not {value!r}.")
        num_heads = hf_config["num_attention_heads"]
        head_size = hf_config["hidden_size"] // num_heads
        num_layers = hf_config["num_hidden_layers"]
        return ModelSpec(
            attention=tuple(AttentionSpec(layer=layer, scale=head_size**-0.5) for layer in range(num_layers)),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_size=head_size,
            hidden_size=hf_config["hidden_size"],
            vocab_size=hf_config["vocab_size"],
            max_model_len=hf_config["max_position_embeddings"],
        )

    def __init__(self, hf_config: Mapping[str, Any], context: BuildContext) -> None:
        spec = self.spec(hf_config)
        # The largest checkpoints were saved without the outermost name.
        context.alias("decoder.", "model.decoder.")
        size, width = spec.hidden_size, hf_config.get("word_embed_proj_dim") or spec.hidden_size
        norms_before = hf_config.get("do_layer_norm_before", True)
        self._tokens = context.embedding("model.decoder.embed_tokens", spec.vocab_size, width, split=True)
        self._positions = context.embedding("model.decoder.embed_positions", spec.max_model_len + _POSITION_OFFSET, size)
        self._project_in = self._project_out = None
        if width != size:
            self._project_in = context.linear("model.decoder.project_in", width, size)
            self._project_out = context.linear("model.decoder.project_out", size, width)
        self._layers = [_Layer(layer, hf_config, spec, context) for layer in range(spec.num_layers)]
        self._norm = None
        if norms_before and not hf_config.get("_remove_final_layer_norm"):
            self._norm = context.layer_norm("model.decoder.final_layer_norm", size, _EPS)
        tied_to = self._tokens if hf_config.get("tie_word_embeddings", True) else None
        self._head = context.output_head("lm_head", spec.vocab_size, width, tied_to=tied_to)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embedding table's rows, widened to the hidden size."""
        hidden = self._tokens(input_ids)
        return hidden if self._project_in is None else self._project_in(hidden)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Positions, all layers and the final norm."""
        hidden = hidden + self._positions(positions + _POSITION_OFFSET)
        for layer in self._layers:
            hidden = layer(hidden, attend)
        return hidden if self._norm is None else self._norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head, on hidden states narrowed to the embeddings' size."""
        return self._head(hidden if self._project_out is None else self._project_out(hidden))


class _Layer:
    """Attention, then the MLP, each with its norm before it (350m: behind it)."""

    def __init__(self, layer: int, hf_config: Mapping[str, Any], spec: ModelSpec, context: BuildContext) -> None:
        name, size, inner = f"model.decoder.layers.{layer}", spec.hidden_size, hf_config["ffn_dim"]
        bias = hf_config.get("enable_bias", True)
        self._layer, self._norms_before = layer, hf_config.get("do_layer_norm_before", True)
        self._qkv = context.linear(
            [f"{name}.self_attn.{part}_proj" for part in "qkv"],
            size,
            [size] * 3,
            bias=bias,
            split="column",
            unit=spec.head_size,
        )
        self._out = context.linear(f"{name}.self_attn.out_proj", size, size, bias=bias, split="row")
        self._attention_norm = context.layer_norm(f"{name}.self_attn_layer_norm", size, _EPS)
        self._up = context.linear(f"{name}.fc1", size, inner, bias=bias, split="column")
        self._down = context.linear(f"{name}.fc2", inner, size, bias=bias, split="row")
        self._mlp_norm = context.layer_norm(f"{name}.final_layer_norm", size, _EPS)

    def __call__(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        if self._norms_before:
            hidden = hidden + self._attention(self._attention_norm(hidden), attend)
            return hidden + self._mlp(self._mlp_norm(hidden))
        hidden = self._attention_norm(hidden + self._attention(hidden, attend))
        return self._mlp_norm(hidden + self._mlp(hidden))

    def _attention(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = self._qkv(x).split(self._qkv.sizes, dim=-1)
        return self._out(attend(self._layer, q, k, v))

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._up(x).relu())
