"""Tiny models under each quantization, beside the same in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cacheflow.config import EngineConfig
from cacheflow.errors import ConfigError
from cacheflow.interfaces import OpSpec
from cacheflow.loading.model import LoadedModel, load_model
from cacheflow.loading.resolve import resolve_model
from cacheflow.plugins import find_plugins, load_plugin

CPU = torch.device("cpu")
MAX_ERRORS = {"int8": 0.02, "int4": 0.25, "int8-dynamic": 0.05}
"""Of a logit, RMS relative to the logits' own: two layers and the head of random normal weights."""
GROUP = "cacheflow.op_providers"


def providers() -> list[str]:
    spec = OpSpec(dtype=torch.float32, device=CPU)
    return [name for name in find_plugins(GROUP) if not load_plugin(GROUP, name).supports(spec)]


def load(folder: Path, provider: str, quantization: str) -> LoadedModel:
    ops = load_plugin(GROUP, provider)(OpSpec(dtype=torch.float32, device=CPU))
    return load_model(resolve_model(EngineConfig(model=str(folder))), torch.float32, CPU, ops, quantization=quantization)


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    heads = loaded.spec.num_heads // loaded.spec.num_kv_heads

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spread: torch.Tensor = v.unflatten(-1, (-1, loaded.spec.head_size)).repeat_interleave(heads, dim=1).flatten(1)
        return q + spread

    with torch.inference_mode():
        tokens = torch.arange(4, 36)
        logits: torch.Tensor = loaded.model.logits(loaded.model.forward(loaded.model.embed(tokens), tokens, attend))
    return logits


@pytest.fixture(scope="module", params=["llama", "opt"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared: dict[str, Any] = {"vocab_size": 301, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if request.param == "llama":
        config: transformers.PretrainedConfig = transformers.LlamaConfig(
            **shared, intermediate_size=144, num_key_value_heads=2, tie_word_embeddings=True
        )
    else:
        config = transformers.OPTConfig(**shared, ffn_dim=144, word_embed_proj_dim=96)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    path: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("provider", providers())
@pytest.mark.parametrize("quantization", list(MAX_ERRORS))
def test_logits_stay_near_those_of_the_float_model(folder: Path, provider: str, quantization: str) -> None:
    exact, near = logits_of(load(folder, "torch", "none")), logits_of(load(folder, provider, quantization))
    error = float((near - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < error <= MAX_ERRORS[quantization], error


def test_an_unknown_quantization_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--quantization must be one of .*none, int8, int4, int8-dynamic"):
        EngineConfig(quantization="int3")
