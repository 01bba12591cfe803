"""What the loaders' tests share: a way to load a folder or file and to compute with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheflow.config import EngineConfig
from cacheflow.interfaces import OpSpec
from cacheflow.layers.torch_ops import TorchOps
from cacheflow.loading.model import LoadedModel, load_model
from cacheflow.loading.resolve import resolve_model

CPU = torch.device("cpu")


@pytest.fixture
def load() -> Callable[..., LoadedModel]:
    """Loads a model in float32."""

    def load_in_float32(path: Path, **options: Any) -> LoadedModel:
        files = resolve_model(EngineConfig(model=str(path), **options))
        return load_model(files, torch.float32, CPU, TorchOps(OpSpec(dtype=torch.float32, device=CPU)))

    return load_in_float32


@pytest.fixture
def logits_of() -> Callable[[LoadedModel], torch.Tensor]:
    """Logits of eight tokens that do not see each other: enough to tell any two sets of weights apart."""

    def compute(loaded: LoadedModel) -> torch.Tensor:
        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            heads = loaded.spec.num_heads // loaded.spec.num_kv_heads
            mixed = v.unflatten(-1, (-1, loaded.spec.head_size)).repeat_interleave(heads, dim=1)
            # Queries and keys must count too.
            return q * k.unflatten(-1, (-1, loaded.spec.head_size)).repeat_interleave(heads, dim=1).flatten(1) + mixed.flatten(
                1
            )

        with torch.inference_mode():
            hidden = loaded.model.embed(torch.arange(10, 18))
            return loaded.model.logits(loaded.model.forward(hidden, torch.arange(8), attend))

    return compute
