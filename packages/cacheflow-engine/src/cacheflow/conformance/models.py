"""Conformance of `cacheflow.models`: a model is a function of its arguments, and its `spec` tells the truth.

A model class gives the suite something to build in a class attribute `TINY`: a complete `config.json` of a model of a few
layers and some dozens of hidden elements, as a mapping. The weights are random. Whether the numbers are *right* is for a test
against the model's original to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from cacheflow.conformance.attention_backends import reference_attention
from cacheflow.conformance.verdict import NotApplicable, expect, expect_close
from cacheflow.interfaces import ModelSpec, OpSpec
from cacheflow.layers import BuildContext
from cacheflow.plugins import load_plugin

NUM_TOKENS = 23


def _tiny_config(plugin: Any, name: str) -> Mapping[str, Any]:
    tiny = getattr(plugin, "TINY", None)
    if tiny is None:
        raise NotApplicable(f"{plugin.__name__} has no attribute TINY, a mapping with a tiny model's config.json")
    return MappingProxyType({"architectures": [name], **tiny})


def _build(plugin: Any, name: str, seed: int = 0) -> tuple[Any, ModelSpec]:
    """The tiny model with random weights, in float32 on the CPU, on the engine's plain-torch operations."""
    dtype, device = torch.float32, torch.device("cpu")
    config = _tiny_config(plugin, name)
    context = BuildContext(load_plugin("cacheflow.op_providers", "torch")(OpSpec(dtype=dtype, device=device)), dtype, device)
    model, spec = plugin(config, context), plugin.spec(config)
    generator = torch.Generator().manual_seed(seed)
    expect(context.shapes, "the constructor declares no parameters through its BuildContext")
    for parameter, shape in context.shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            noise = noise * 1.5 / shape[-1] ** 0.5
        elif parameter.endswith("weight"):
            noise = 1 + 0.1 * noise
        context.load(parameter, noise)
    context.finish()
    return model, spec


class _Sequences:
    """An `attend` over any number of sequences, each with a cache that grows: the suite's own KV cache.

    `spans` says whose tokens the rows of the next call of `forward` are.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._cache: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.spans: list[tuple[str, int]] = []
        self.layers: list[int] = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec = self._spec
        num_rows = sum(count for _, count in self.spans)
        for what, x, heads in (("q", q, spec.num_heads), ("k", k, spec.num_kv_heads), ("v", v, spec.num_kv_heads)):
            wanted = (num_rows, heads * spec.head_size)
            expect(
                tuple(x.shape) == wanted, f"layer {layer}: attend was given a {what} of {tuple(x.shape)}, spec says {wanted}"
            )
        self.layers.append(layer)
        out, row = [], 0
        for name, count in self.spans:
            rows = slice(row, row + count)
            new = tuple(x[rows].unflatten(1, (-1, spec.head_size)) for x in (q, k, v))
            old = self._cache.get((name, layer))
            whole = new if old is None else tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
            self._cache[name, layer] = (whole[0].clone(), whole[1].clone(), whole[2].clone())
            start = whole[0].shape[0] - count
            out.append(reference_attention(spec.attention[layer], *self._cache[name, layer], start).flatten(1))
            row += count
        return torch.cat(out)


def _hidden(
    model: Any, attend: _Sequences, spans: list[tuple[str, int]], ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    attend.spans = spans
    hidden = model.forward(model.embed(ids), positions, attend)
    assert isinstance(hidden, torch.Tensor)
    return hidden


def _ids(spec: ModelSpec, seed: int = 0, count: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randint(spec.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def _whole(model: Any, spec: ModelSpec, ids: torch.Tensor) -> torch.Tensor:
    return _hidden(model, _Sequences(spec), [("a", len(ids))], ids, torch.arange(len(ids)))


def check_spec_is_consistent(plugin: Any, name: str) -> None:
    """`spec` numbers the layers from 0, has whole groups of heads, and does not change the configuration."""
    spec = plugin.spec(_tiny_config(plugin, name))
    expect(isinstance(spec, ModelSpec), f"spec must return a ModelSpec, got {type(spec).__name__}")
    numbers = [entry.layer for entry in spec.attention]
    expect(
        numbers == list(range(spec.num_layers)) and numbers,
        f"attention must have an entry per layer, numbered from 0, got {numbers}",
    )
    heads = f"{spec.num_heads} query heads and {spec.num_kv_heads} kv heads"
    expect(spec.num_kv_heads >= 1 and spec.num_heads % spec.num_kv_heads == 0, f"kv heads must divide query heads, got {heads}")
    expect(
        spec.max_model_len > NUM_TOKENS, f"TINY needs a context of more than {NUM_TOKENS} tokens, it has {spec.max_model_len}"
    )
    for entry in spec.attention:
        slopes = entry.alibi_slopes
        expect(slopes is None or len(slopes) == spec.num_heads, f"layer {entry.layer} must have one ALiBi slope per query head")
    expect(plugin.spec(_tiny_config(plugin, name)) == spec, "spec must give the same for the same configuration")


def check_shapes_agree_with_spec(plugin: Any, name: str) -> None:
    """`embed`, `forward`, `logits` and what `attend` is given have the sizes that `spec` says; each layer attends once."""
    model, spec = _build(plugin, name)
    ids, attend = _ids(spec), _Sequences(spec)
    embedded = model.embed(ids)
    size = (NUM_TOKENS, spec.hidden_size)
    expect(tuple(embedded.shape) == size, f"embed gives {tuple(embedded.shape)}, spec says {size}")
    hidden = _hidden(model, attend, [("a", NUM_TOKENS)], ids, torch.arange(NUM_TOKENS))
    expect(tuple(hidden.shape) == size, f"forward gives {tuple(hidden.shape)}, spec says {size}")
    expect(attend.layers == list(range(spec.num_layers)), f"attend must be called once per layer in order, got {attend.layers}")
    logits = model.logits(hidden[-3:])
    expect(
        tuple(logits.shape) == (3, spec.vocab_size),
        f"logits of 3 rows are {tuple(logits.shape)}, spec says (3, {spec.vocab_size})",
    )
    expect(bool(logits.isfinite().all()), "logits must be finite")


def check_forward_is_a_pure_function(plugin: Any, name: str) -> None:
    """The same call gives the same result, whatever was computed in between."""
    model, spec = _build(plugin, name)
    first = _whole(model, spec, _ids(spec)).clone()
    _whole(model, spec, _ids(spec, seed=1, count=5))
    second = _whole(model, spec, _ids(spec))
    expect(
        torch.equal(first, second), "forward gave two results for the same arguments: the model keeps something between calls"
    )


def check_chunks_equal_whole(plugin: Any, name: str) -> None:
    """A prompt in chunks of 1, 3 and 7 tokens over a growing cache gives what it gives whole."""
    model, spec = _build(plugin, name)
    ids = _ids(spec)
    expected = _whole(model, spec, ids)
    for size in (1, 3, 7):
        attend, parts = _Sequences(spec), []
        for start in range(0, NUM_TOKENS, size):
            chunk = ids[start : start + size]
            parts.append(_hidden(model, attend, [("a", len(chunk))], chunk, torch.arange(start, start + len(chunk))))
        expect_close(torch.cat(parts), expected, torch.float32, f"chunks of {size} against the whole prompt")


def check_sequences_do_not_mix(plugin: Any, name: str) -> None:
    """Two sequences in one batch give what each gives alone: only `attend` looks at other tokens."""
    model, spec = _build(plugin, name)
    a, b = _ids(spec, seed=1, count=11), _ids(spec, seed=2, count=6)
    together = _hidden(
        model, _Sequences(spec), [("a", 11), ("b", 6)], torch.cat([a, b]), torch.cat([torch.arange(11), torch.arange(6)])
    )
    alone = torch.cat([_whole(model, spec, a), _whole(model, spec, b)])
    expect_close(together, alone, torch.float32, "two sequences in one batch against each alone")


def check_positions_matter(plugin: Any, name: str) -> None:
    """`forward` uses the positions that it is given, not a count of its own: the order of tokens changes the result.

    The gaps between positions are uneven, since rotary and ALiBi models see only distances.
    """
    model, spec = _build(plugin, name)
    if any(entry.alibi_slopes for entry in spec.attention):
        raise NotApplicable("with ALiBi slopes the positions are the attention's business")
    ids = _ids(spec, count=6)
    first = _hidden(model, _Sequences(spec), [("a", 6)], ids, torch.tensor([0, 1, 2, 3, 4, 5]))
    second = _hidden(model, _Sequences(spec), [("a", 6)], ids, torch.tensor([0, 2, 3, 7, 11, 20]))
    expect(not torch.allclose(first[1:], second[1:], atol=1e-5), "other positions must give other hidden states")


CHECKS = (
    check_spec_is_consistent,
    check_shapes_agree_with_spec,
    check_forward_is_a_pure_function,
    check_chunks_equal_whole,
    check_sequences_do_not_mix,
    check_positions_matter,
)
