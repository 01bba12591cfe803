"""The layers that a `BuildContext` makes: functions of their arguments, once their weights are packed.

They know their parameters and their ranks; they do not know names in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from cacheflow.interfaces import OpProvider
    from cacheflow.layers.parallel import ParallelGroup
    from cacheflow.layers.parameters import Parameter, Shard


class Linear:
    """A matrix product, fused from one or several checkpoint matrices.

    Attributes:
        sizes: Elements that each checkpoint matrix adds to an output row of this rank; `split` wants them. Gated: the gate's.
    """

    def __init__(
        self,
        weight: Parameter,
        bias: Parameter | None,
        sizes: tuple[int, ...],
        sum_over: ParallelGroup | None,
        form: str,
        is_gated: bool,
    ) -> None:
        self.sizes = sizes[:1] if is_gated else sizes
        self._form, self._is_gated = form, is_gated
        self._raw: tuple[Parameter, Parameter | None] | None = (weight, bias)
        self._sum_over = sum_over
        self._product: Callable[[torch.Tensor], torch.Tensor]

    def pack(self, ops: OpProvider) -> None:
        """Packs the filled weights and lets go of the raw ones."""
        assert self._raw is not None, "packed twice"
        weight, bias = self._raw
        # Of ranks that add up their products, only one may add the bias.
        adds_bias = bias is not None and (self._sum_over is None or self._sum_over.rank == 0)
        offset = bias.tensor if bias is not None and adds_bias else None
        self._product = ops.linear(weight.tensor, offset, form=self._form, is_gated=self._is_gated)
        self._raw = None

    @property
    def product(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """This rank's product, as the op provider packed it."""
        return self._product

    @property
    def is_summed(self) -> bool:
        """Whether ranks add up their products."""
        return self._sum_over is not None and self._sum_over.size > 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_rows, in_features]` → `[num_rows, sum(sizes)]`."""
        y = self._product(x)
        return y if self._sum_over is None else self._sum_over.all_reduce(y)


class Embedding:
    """A table of vectors, looked up by row.

    Attributes:
        parameter: The table, for a head that shares it.
    """

    def __init__(self, parameter: Parameter, shard: Shard, group: ParallelGroup) -> None:
        self.parameter = parameter
        self._shard = shard
        self._group = group

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens] int64` → `[num_tokens, size]`."""
        table = self.parameter.tensor
        if self._shard.axis is None or self._group.size == 1:
            return functional.embedding(ids, table)
        rows = ids - self._shard.start
        is_elsewhere = (rows < 0) | (rows >= self._shard.length)
        found = functional.embedding(rows.masked_fill(is_elsewhere, 0), table)
        return self._group.all_reduce(found.masked_fill(is_elsewhere[:, None], 0))


class OutputHead:
    """Hidden states to logits. Each rank computes its share of the vocabulary, and all get the whole."""

    def __init__(self, weight: Parameter, bias: Parameter | None, vocab_size: int, group: ParallelGroup, form: str) -> None:
        self._form = form
        self._raw: tuple[Parameter, Parameter | None] | None = (weight, bias)
        self._vocab_size = vocab_size
        self._group = group
        self._product: Callable[[torch.Tensor], torch.Tensor]

    def pack(self, ops: OpProvider) -> None:
        """Packs the filled weights and lets go of the raw ones."""
        assert self._raw is not None, "packed twice"
        weight, bias = self._raw
        self._product = ops.linear(weight.tensor, None if bias is None else bias.tensor, form=self._form)
        self._raw = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, in_features]` → `[num_rows, vocab_size]`."""
        logits = self._group.all_gather(self._product(hidden))
        # Shares are padded to one length, so what lies behind the vocabulary is cut off.
        return logits if logits.shape[1] == self._vocab_size else logits[:, : self._vocab_size]


class RMSNorm:
    """RMSNorm, alone or with the addition that comes before it."""

    def __init__(self, weight: torch.Tensor, eps: float, ops: OpProvider) -> None:
        self.weight, self.eps, self._ops = weight, eps, ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, size]` to the same shape."""
        return self._ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(norm(x + residual), x + residual)`, without a residual `(norm(x), x)`; either input may be overwritten."""
        if residual is None:
            return self(x), x
        return self._ops.fused_add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm:
    """LayerNorm."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, ops: OpProvider) -> None:
        self._weight, self._bias, self._eps, self._ops = weight, bias, eps, ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, size]` to the same shape."""
        return self._ops.layer_norm(x, self._weight, self._bias, self._eps)
