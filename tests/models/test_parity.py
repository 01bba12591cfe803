"""Every architecture against its original in transformers, as a tiny random twin: one row each."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from cacheflow.config import EngineConfig
from cacheflow.interfaces import Architecture, ModelSpec, OpSpec
from cacheflow.layers import BuildContext, ParallelGroup
from cacheflow.layers.torch_ops import TorchOps
from cacheflow.loading.model import find_architecture, load_model
from cacheflow.loading.resolve import ModelFiles, resolve_model

CPU = torch.device("cpu")
MAX_DIFFERENCE = 1e-4
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 128,
}
OPT = {
    "hidden_size": 64,
    "ffn_dim": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 301,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama-3-with-biases": transformers.LlamaConfig(
        **LLAMA, head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "llama-linear-rope": transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "opt": transformers.OPTConfig(**OPT),
    "opt-350m": transformers.OPTConfig(**(OPT | {"word_embed_proj_dim": 32}), do_layer_norm_before=False),
}
TOKENS = torch.randint(4, 301, (40,), generator=torch.Generator().manual_seed(1))


class GrowingCache:
    """`attend` over all that was seen so far."""

    def __init__(self, spec: ModelSpec, num_ranks: int = 1) -> None:
        self._spec, self._num_ranks, self._seen = spec, num_ranks, {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (torch.cat(pair) for pair in zip(self._seen.get(layer, (k[:0], v[:0])), (k, v), strict=True))
        self._seen[layer] = k, v
        q, k, v = (x.unflatten(-1, (-1, self._spec.head_size)).transpose(0, 1) for x in (q, k, v))
        visible = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
        scale = self._spec.attention[layer].scale
        return scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Twins:
    files: ModelFiles
    model: Architecture
    spec: ModelSpec
    expected: torch.Tensor


def run(model: Architecture, tokens: torch.Tensor, start: int, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        positions = torch.arange(start, start + len(tokens))
        return model.logits(model.forward(model.embed(tokens), positions, attend))


def randomise(model: torch.nn.Module) -> None:
    """Large random weights, so that logits are far from flat, and biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else noise * (0.2 if parameter.ndim > 1 else 0.1))


@pytest.fixture(scope="module", params=list(TINY))
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    folder: Path = tmp_path_factory.mktemp(request.param)
    original = transformers.AutoModelForCausalLM.from_config(TINY[request.param], dtype=torch.float32).eval()
    randomise(original)
    original.save_pretrained(folder)
    with torch.inference_mode():
        expected = original(TOKENS[None]).logits[0]
    files = resolve_model(EngineConfig(model=str(folder)))
    loaded = load_model(files, torch.float32, CPU, TorchOps(OpSpec(dtype=torch.float32, device=CPU)))
    return Twins(files, loaded.model, loaded.spec, expected)


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.5, "flat logits would prove nothing"
    assert (logits - expected).abs().max() <= MAX_DIFFERENCE


def test_logits_of_a_whole_text_equal_the_originals(twins: Twins) -> None:
    assert_close(run(twins.model, TOKENS, 0, GrowingCache(twins.spec)), twins.expected)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_logits_of_a_text_in_chunks_equal_the_originals(twins: Twins, chunk: int) -> None:
    attend = GrowingCache(twins.spec)
    parts = [run(twins.model, TOKENS[at : at + chunk], at, attend) for at in range(0, len(TOKENS), chunk)]
    assert_close(torch.cat(parts), twins.expected)


def test_logits_behind_a_cached_prefix_equal_the_originals(twins: Twins) -> None:
    prefix = GrowingCache(twins.spec)
    run(twins.model, TOKENS[:16], 0, prefix)
    for _ in range(2):
        logits = run(twins.model, TOKENS[16:], 16, copy.deepcopy(prefix))
        assert_close(logits, twins.expected[16:])


def declare(twins: Twins, group: ParallelGroup | None = None) -> tuple[Architecture, BuildContext]:
    config = twins.files.hf_config
    context = BuildContext(TorchOps(OpSpec(dtype=torch.float32, device=CPU)), torch.float32, CPU, group)
    return find_architecture(config)[1](config, context), context


def test_every_checkpoint_tensor_is_used(twins: Twins) -> None:
    in_checkpoint = {name: tuple(tensor.shape) for name, tensor in twins.files.loader.tensors(twins.files.path)}
    assert declare(twins)[1].shapes == in_checkpoint


class ThreadGroup:
    """Ranks that are threads of this process."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self._barrier, self._board = rank, barrier, board

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._board[self.rank] = tensor
        self._barrier.wait(timeout=300)
        tensors = list(self._board)
        self._barrier.wait(timeout=300)
        return tensors

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(tensor), dim=-1)


def test_two_ranks_give_what_one_gives(twins: Twins) -> None:
    barrier, board = threading.Barrier(2), [None, None]

    def run_rank(rank: int) -> torch.Tensor:
        model, context = declare(twins, ThreadGroup(rank, barrier, board))
        for name, tensor in twins.files.loader.tensors(twins.files.path):
            context.load(name, tensor)
        context.finish()
        return run(model, TOKENS, 0, GrowingCache(twins.spec))

    with ThreadPoolExecutor(2) as pool:
        for logits in pool.map(run_rank, range(2)):
            assert_close(logits, twins.expected)


def test_a_checkpoint_without_its_outermost_name_is_opt_too(tmp_path: Path) -> None:
    """As the largest OPT checkpoints on the hub were saved."""
    original = transformers.OPTForCausalLM(TINY["opt"]).eval()
    randomise(original)
    original.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(original.model.state_dict(), tmp_path / "pytorch_model.bin")
    files = resolve_model(EngineConfig(model=str(tmp_path)))
    loaded = load_model(files, torch.float32, CPU, TorchOps(OpSpec(dtype=torch.float32, device=CPU)))
    with torch.inference_mode():
        expected = original(TOKENS[None]).logits[0]
    assert_close(run(loaded.model, TOKENS, 0, GrowingCache(loaded.spec)), expected)
