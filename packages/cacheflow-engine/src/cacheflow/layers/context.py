"""`BuildContext`: what a model's constructor is given, and through which it declares every parameter.

It owns allocation, filling and packing of parameters. It knows no files, no architectures and no KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from cacheflow.errors import CheckpointError, ConfigError
from cacheflow.layers.modules import Embedding, LayerNorm, Linear, OutputHead, RMSNorm
from cacheflow.layers.parallel import ParallelGroup, SingleRank
from cacheflow.layers.parameters import Parameter, Shard
from cacheflow.layers.quantization import LinearForms
from cacheflow.layers.rotary import Rotary

if TYPE_CHECKING:
    from cacheflow.interfaces import OpProvider

_MAX_NAMES_SHOWN = 5


class BuildContext:
    """Makes the layers of one model for one rank.

    A model's constructor calls the methods that declare parameters, by their names in a checkpoint without the final
    `.weight` or `.bias`. Then the engine calls `load` for every checkpoint tensor and `finish` once; before that no layer
    can be called.

    Args:
        ops: As the attribute.
        dtype: As the attribute.
        device: As the attribute.
        group: As the attribute; None: one rank.
        forms: How matrices are kept; None: in `dtype`.

    Attributes:
        ops: The operations that the layers use; a model may call `silu_and_mul` and its like itself.
        dtype: Of parameters and arithmetic.
        device: Where they live.
        group: The ranks that share each layer.
    """

    def __init__(
        self,
        ops: OpProvider,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup | None = None,
        forms: LinearForms | None = None,
    ) -> None:
        self.ops = ops
        self.dtype = dtype
        self.device = device
        self.group: ParallelGroup = group or SingleRank()
        self._forms = forms or LinearForms()
        self._parameters: dict[str, Parameter] = {}
        self._unpacked: list[tuple[Linear | OutputHead, list[Parameter]]] = []
        self._num_declared = 0
        self._ignored: list[str] = []
        self._aliases: dict[str, str] = {}

    # Declaring

    def linear(
        self,
        names: str | Sequence[str],
        in_features: int,
        out_features: int | Sequence[int],
        *,
        bias: bool = False,
        split: Literal["column", "row"] | None = None,
        unit: int = 1,
        is_gated: bool = False,
    ) -> Linear:
        """A matrix product. Several names become one matrix, whose outputs lie side by side.

        Args:
            names: Of one matrix, or of several with the same input (q, k, v; gate, up).
            in_features: Elements of an input row.
            out_features: Elements of an output row, one number per name.
            bias: Each name has a `.bias` too.
            split: "column": ranks share the outputs, and each returns its own; "row": ranks share the inputs, each is given
                its own, and all return the sum; None: every rank computes everything.
            unit: Outputs of a column split are divided in whole units of so many features, such as a head.
            is_gated: There are two names of equal size, a gate and what it lets through, and the layer returns
                `silu(gate) * up` (SwiGLU, arXiv:2002.05202).

        Returns:
            Maps `[num_rows, in_features]` to `[num_rows, sum of out_features]`, gated half as many, divided by `split`.

        Raises:
            ConfigError: The number of ranks does not divide the features.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        sizes = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        assert len(names) == len(sizes), f"{len(names)} names with {len(sizes)} sizes"
        assert not is_gated or (len(sizes) == 2 and sizes[0] == sizes[1]), f"gated, with the sizes {sizes}"
        for name, size in zip(names, sizes, strict=True):
            if split is not None:
                self._check_divides(name, size // unit if split == "column" else in_features)
        axis = {None: None, "column": 0, "row": 1}[split]
        shapes = {name: (size, in_features) for name, size in zip(names, sizes, strict=True)}
        # Integers are made of all the digits that the checkpoint has.
        dtype = self.dtype if self._forms.layers == "plain" else torch.float32
        weight = self._parameter({f"{name}.weight": (shape, axis) for name, shape in shapes.items()}, dtype)
        bias_axis = 0 if split == "column" else None
        offset = self._parameter({f"{name}.bias": (shape[:1], bias_axis) for name, shape in shapes.items()}) if bias else None
        local_sizes = tuple(size // self.group.size if split == "column" else size for size in sizes)
        sum_over = self.group if split == "row" else None
        layer = Linear(weight, offset, local_sizes, sum_over, self._forms.layers, is_gated)
        self._unpacked.append((layer, [weight] if offset is None else [weight, offset]))
        return layer

    def embedding(self, name: str, num_rows: int, size: int, *, split: bool = False) -> Embedding:
        """A table of `num_rows` vectors of `size` elements; under `split` each rank holds some of the rows."""
        weight = self._parameter({f"{name}.weight": ((num_rows, size), 0 if split else None)})
        return Embedding(weight, weight.shards[f"{name}.weight"], self.group)

    def output_head(
        self, name: str, num_rows: int, in_features: int, *, bias: bool = False, tied_to: Embedding | None = None
    ) -> OutputHead:
        """The matrix that makes logits, `[num_rows, in_features] → [num_rows, vocab_size]`; ranks share the vocabulary.

        Args:
            name: Its name in a checkpoint.
            num_rows: The vocabulary's size.
            in_features: Elements of a hidden state.
            bias: It has a `.bias` too.
            tied_to: The embedding, made with `split=True`, whose table it shares; a table of its own in the checkpoint is
                then ignored.
        """
        if tied_to is not None:
            self.ignore(f"{name}.weight")
            weight = tied_to.parameter
        else:
            weight = self._parameter({f"{name}.weight": ((num_rows, in_features), 0)})
        offset = self._parameter({f"{name}.bias": ((num_rows,), 0)}) if bias else None
        head = OutputHead(weight, offset, num_rows, self.group, self._forms.head)
        self._unpacked.append((head, [weight] if offset is None else [weight, offset]))
        return head

    def rms_norm(self, name: str, size: int, eps: float) -> RMSNorm:
        """RMSNorm (arXiv:1910.07467) over `size` elements."""
        return RMSNorm(self._parameter({f"{name}.weight": ((size,), None)}).tensor, eps, self.ops)

    def layer_norm(self, name: str, size: int, eps: float, *, bias: bool = True) -> LayerNorm:
        """LayerNorm over `size` elements."""
        weight = self._parameter({f"{name}.weight": ((size,), None)}).tensor
        offset = self._parameter({f"{name}.bias": ((size,), None)}).tensor if bias else None
        return LayerNorm(weight, offset, eps, self.ops)

    def rotary(self, hf_config: Mapping[str, Any], head_size: int, *, is_neox: bool = True) -> Rotary:
        """Rotary position embedding as the configuration describes it; one serves all layers.

        Args:
            hf_config: Its `rope_parameters`, or `rope_theta` and `rope_scaling`, and `max_position_embeddings` are read.
            head_size: Elements of one head.
            is_neox: Pairs are (i, i + rotary_size / 2); otherwise (2i, 2i + 1).

        Raises:
            UnsupportedModelError: The kind of scaling is not implemented.
        """
        self.ignore("rotary_emb.inv_freq")
        return Rotary(hf_config, head_size, is_neox, self.ops, self.device)

    def ignore(self, suffix: str) -> None:
        """Checkpoint tensors whose names end so are known, and not needed."""
        self._ignored.append(suffix)

    def alias(self, prefix: str, meaning: str) -> None:
        """Checkpoint tensors whose names begin with `prefix` are taken as if they began with `meaning`."""
        self._aliases[prefix] = meaning

    # Filling

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of all checkpoint tensors that the declared parameters need."""
        return {name: parameter.shards[name].shape for name, parameter in self._parameters.items()}

    def parameter(self, name: str) -> Parameter:
        """The parameter that a checkpoint tensor fills; a matrix's only until it is packed."""
        return self._parameters[name]

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Copies a checkpoint tensor into its place. A matrix that has all its parts is packed, and its raw form let go.

        Raises:
            CheckpointError: No parameter has this name and it is not to be ignored, or its shape or dtype does not fit.
        """
        for prefix, meaning in self._aliases.items():
            if name.startswith(prefix):
                name = meaning + name.removeprefix(prefix)
        if name in self._parameters:
            self._parameters[name].load(name, tensor)
            self._pack_filled()
        elif not name.endswith(tuple(self._ignored)):
            raise CheckpointError(
                f"The checkpoint has a tensor {name} {list(tensor.shape)} that its architecture has no place for. "
                f"The weights and config.json don't belong together, or this variant is not supported."
            )

    def finish(self) -> None:
        """Checks that every parameter has been filled.

        Raises:
            CheckpointError: Tensors are missing from the checkpoint.
        """
        missing = sorted({name for parameter in self._parameters.values() for name in parameter.missing})
        if missing:
            shown = ", ".join(missing[:_MAX_NAMES_SHOWN]) + (", …" if len(missing) > _MAX_NAMES_SHOWN else "")
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} of {self._num_declared} tensors: {shown}. "
                f"A file of it is missing, or the weights and config.json don't belong together."
            )
        assert not self._unpacked
        self._parameters.clear()

    def _pack_filled(self) -> None:
        """At once and not at the end, so that the raw forms of all matrices are never there together."""
        filled = [(layer, parts) for layer, parts in self._unpacked if not any(part.missing for part in parts)]
        for layer, parts in filled:
            layer.pack(self.ops)
            self._unpacked.remove((layer, parts))
            for name in [name for part in parts for name in part.shards]:
                self._parameters.pop(name, None)

    def _parameter(
        self, parts: Mapping[str, tuple[tuple[int, ...], int | None]], dtype: torch.dtype | None = None
    ) -> Parameter:
        shards = {name: Shard(shape, axis, self.group.rank, self.group.size) for name, (shape, axis) in parts.items()}
        parameter = Parameter(shards, dtype or self.dtype, self.device)
        assert not self._parameters.keys() & shards.keys(), "a checkpoint tensor was declared twice"
        self._parameters.update(dict.fromkeys(shards, parameter))
        self._num_declared += len(shards)
        return parameter

    def _check_divides(self, name: str, count: int) -> None:
        if count % self.group.size:
            raise ConfigError(
                f"--tensor-parallel-size {self.group.size} does not divide the {count} parts of {name}. "
                f"Choose a number that divides the model's heads and sizes."
            )
