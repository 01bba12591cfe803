"""The group `cacheflow.models`: a model class, its numbers, and how it reaches the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from cacheflow.layers import BuildContext


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What is particular to one layer's attention.

    Attributes:
        layer: Its number in the whole model, from 0.
        scale: Factor of q · k.
        window: Each position sees itself and the `window - 1` before it; None: all before it.
        alibi_slopes: One per query head (ALiBi, arXiv:2108.12409), or None.
        soft_cap: Scores become `soft_cap * tanh(score / soft_cap)`, or None.
    """

    layer: int
    scale: float
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The numbers of a model that the engine plans with.

    Attributes:
        attention: One entry per layer.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_size: Elements of one head.
        hidden_size: Elements of one token's hidden state.
        vocab_size: Rows of the logits.
        max_model_len: Longest context the model was made for, in tokens.
    """

    attention: tuple[AttentionSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_model_len: int

    @property
    def num_layers(self) -> int:
        """Layers in the whole model."""
        return len(self.attention)


class Attend(Protocol):
    """How a model reaches the KV cache: it hides blocks, batches and backends."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores this step's keys and values, then attends causally within each sequence.

        Args:
            layer: Its number in the whole model.
            q: `[num_tokens, num_heads * head_size]`; as k and v overwritten once the next layer begins.
            k: `[num_tokens, num_kv_heads * head_size]`.
            v: Like `k`.

        Returns:
            `[num_tokens, num_heads * head_size]`, in `q`'s dtype.
        """
        ...


class Architecture(Protocol):
    """A model class. Its entry-point name is the architecture's name in a Hugging Face configuration.

    A model is a function of its arguments: it keeps no state between calls and knows neither batches nor blocks. Its
    constructor declares every parameter through the `BuildContext`, with its names in a checkpoint.

    A class may have `TINY`, a small Hugging Face configuration: `cacheflow plugins check` builds it and tries the model.
    """

    CONTRACT_VERSION: ClassVar[int]

    @staticmethod
    def spec(hf_config: Mapping[str, Any]) -> ModelSpec:
        """Reads the numbers from a Hugging Face `config.json`.

        Raises:
            UnsupportedModelError: A setting that this class does not implement.
        """
        ...

    def __init__(self, hf_config: Mapping[str, Any], context: BuildContext) -> None: ...

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens] int64` → `[num_tokens, hidden_size]`."""
        ...

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """All layers and the final norm: `[num_tokens, hidden_size]`, positions `[num_tokens] int64`, to the same shape.

        `hidden` may be overwritten.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` → `[num_rows, vocab_size]`."""
        ...
