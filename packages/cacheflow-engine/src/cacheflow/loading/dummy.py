"""Random weights for a model of which only the configuration is there: for tests, and for measuring speed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cacheflow.interfaces import CONTRACT_VERSION
from cacheflow.loading.folder import read_json
from cacheflow.loading.tokenizer_files import read_tokenizer
from cacheflow.types import TokenizerData

if TYPE_CHECKING:
    import torch

_STANDARD_DEVIATION = 0.02
"""The usual `initializer_range` of a Hugging Face configuration."""


class DummyLoader:
    """The weight loader `dummy`.

    Attributes:
        seed: Of the weights.
    """

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    priority: ClassVar[int] = -100
    seed: ClassVar[int] = 0

    @classmethod
    def with_seed(cls, seed: int) -> type[DummyLoader]:
        """A loader whose weights come from another seed."""
        return type("DummyLoader", (cls,), {"seed": seed})

    @classmethod
    def supports(cls, path: Path) -> tuple[str, ...]:
        """Never of its own accord: random weights must not stand in for real ones that are missing."""
        return ("random weights have to be asked for, with --use-dummy-weights",)

    @classmethod
    def config(cls, path: Path) -> dict[str, Any]:
        """`config.json`."""
        return read_json(path / "config.json")

    @classmethod
    def tokenizer(cls, path: Path) -> TokenizerData:
        """The folder's tokenizer files."""
        return read_tokenizer(path)

    @classmethod
    def tensors(cls, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """A random tensor for every name that the architecture declares: norms are one, biases zero."""
        import torch

        from cacheflow.interfaces import OpSpec
        from cacheflow.layers import BuildContext
        from cacheflow.layers.torch_ops import TorchOps
        from cacheflow.loading.model import find_architecture

        config, device = cls.config(path), torch.device("meta")
        architecture = find_architecture(config)[1]
        context = BuildContext(TorchOps(OpSpec(dtype=torch.float32, device=device)), torch.float32, device)
        architecture(config, context)
        generator = torch.Generator().manual_seed(cls.seed)
        for name, shape in context.shapes.items():
            if len(shape) > 1:
                yield name, torch.empty(shape).normal_(0, _STANDARD_DEVIATION, generator=generator)
            else:
                yield name, torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
