"""Conformance of `cacheflow.attention_backends`: paged attention against a loop over single tokens in float32.

Everything goes through `forward`, `copy_blocks` and `swap_blocks`, since the layout of the cache is the backend's own. Blocks
are handed out in random order and filled with garbage first, as a cache looks that has been used. Says nothing about speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cacheflow.conformance.verdict import NotApplicable, expect, expect_close, expect_reasons
from cacheflow.interfaces import AttentionMetadata, AttentionSpec, KVCacheSpec

GARBAGE = 1000.0
"""What unused slots hold: finite, as what earlier sequences leave behind, and large enough to be seen when it leaks."""

SHAPES = (
    (4, 2, 64, 16),
    (2, 2, 64, 16),
    (6, 1, 64, 16),
    (4, 4, 80, 16),
    (3, 3, 64, 8),
    (8, 2, 128, 32),
    (4, 2, 32, 16),
    (5, 1, 24, 5),
)
"""(heads, kv heads, head size, block size): equal, grouped, one kv head, and odd sizes that not every kernel is made for."""

MIXED = ((0, 1), (16, 1), (40, 1), (0, 7), (5, 20), (31, 2), (0, 33))
"""(tokens in the cache, tokens of this step) of each sequence: decodes first, at and beside block borders, then chunks."""


@dataclass
class _Sequence:
    """One sequence: all its tokens' tensors `[length, heads, head_size]`, and where they lie."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: list[int]
    num_cached: int

    @property
    def length(self) -> int:
        return self.q.shape[0]


@dataclass
class _Scene:
    """A backend with a cache and some sequences in it."""

    backend: Any
    spec: KVCacheSpec
    sequences: list[_Sequence]
    num_blocks: int
    kv: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def build(cls, plugin: Any, spec: KVCacheSpec, lengths: Sequence[tuple[int, int]]) -> _Scene:
        """Random tensors from a fixed seed for `lengths`, in blocks handed out in random order."""
        generator = torch.Generator().manual_seed(1)
        counts = [math.ceil((cached + new) / spec.block_size) for cached, new in lengths]
        num_blocks = sum(counts) + 3
        free = torch.randperm(num_blocks, generator=generator).tolist()

        def draw(length: int, heads: int) -> torch.Tensor:
            values = torch.randn(length, heads, spec.head_size, generator=generator)
            return values.to(device=spec.device, dtype=spec.dtype)

        sequences = [
            _Sequence(
                draw(cached + new, spec.num_heads),
                draw(cached + new, spec.num_kv_heads),
                draw(cached + new, spec.num_kv_heads),
                [free.pop() for _ in range(count)],
                cached,
            )
            for (cached, new), count in zip(lengths, counts, strict=True)
        ]
        scene = cls(plugin(spec), spec, sequences, num_blocks)
        scene.kv = [scene.empty_cache() for _ in spec.attention]
        return scene

    def empty_cache(self) -> torch.Tensor:
        shape = self.backend.kv_shape(self.num_blocks)
        return torch.full(tuple(shape), GARBAGE, dtype=self.spec.dtype, device=self.spec.device)

    def metadata(self, spans: Sequence[tuple[_Sequence, int, int]]) -> AttentionMetadata:
        """The batch that computes tokens `[start, stop)` of each sequence."""
        size, device = self.spec.block_size, self.spec.device
        width = max(math.ceil(stop / size) for _, _, stop in spans)
        tables = [s.blocks[: math.ceil(stop / size)] for s, _, stop in spans]
        starts = [0]
        for _, start, stop in spans:
            starts.append(starts[-1] + stop - start)
        slots = [s.blocks[t // size] * size + t % size for s, start, stop in spans for t in range(start, stop)]
        counts = [stop - start for _, start, stop in spans]
        return AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor([stop for _, _, stop in spans], dtype=torch.int32, device=device),
            block_tables=torch.tensor([t + [-1] * (width - len(t)) for t in tables], dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            num_decodes=next((i for i, count in enumerate(counts) if count > 1), len(counts)),
            max_query_len=max(counts),
            max_seq_len=max(stop for _, _, stop in spans),
        )

    def run(self, spans: Sequence[tuple[_Sequence, int, int]], layer: int = 0, plan: Any = None) -> torch.Tensor:
        """Stores and attends; q, k and v come as columns of one tensor, so only their last axis is contiguous."""
        q, k, v = (torch.cat([getattr(s, name)[start:stop] for s, start, stop in spans]) for name in "qkv")
        q, k, v = torch.cat([q, k, v], dim=1).split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
        if plan is None:
            plan = self.backend.plan(self.metadata(spans))
        out = self.backend.forward(self.spec.attention[layer], q, k, v, self.kv[layer], plan)
        assert isinstance(out, torch.Tensor)
        return out

    def fill(self, layer: int = 0) -> None:
        """Stores what each sequence has in the cache, as one step of prompts."""
        spans = [(s, 0, s.num_cached) for s in self.sequences if s.num_cached]
        spans.sort(key=lambda span: span[2] > 1)
        if spans:
            self.run(spans, layer)

    def last_step(self) -> list[tuple[_Sequence, int, int]]:
        return [(s, s.num_cached, s.length) for s in self.sequences]


def reference_attention(layer: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """Causal attention of query tokens `[start, length)` over all keys, one token and one head at a time, in float32.

    Args:
        layer: Scale, window, slopes and soft cap.
        q: `[length, num_heads, head_size]`.
        k: `[length, num_kv_heads, head_size]`.
        v: Like `k`.
        start: The first query token.

    Returns:
        `[length - start, num_heads, head_size] float32`.
    """
    q, k, v = q.float().cpu(), k.float().cpu(), v.float().cpu()
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape[0] - start, q.shape[1], q.shape[2])
    for position in range(start, q.shape[0]):
        first = 0 if layer.window is None else max(0, position - layer.window + 1)
        for head in range(q.shape[1]):
            keys, values = k[first : position + 1, head // group], v[first : position + 1, head // group]
            scores = keys @ q[position, head] * layer.scale
            if layer.soft_cap is not None:
                scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
            if layer.alibi_slopes is not None:
                scores = scores + layer.alibi_slopes[head] * (torch.arange(first, position + 1) - position)
            out[position - start, head] = torch.softmax(scores, dim=0) @ values
    return out


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def _spec(
    shape: tuple[int, int, int, int] = SHAPES[0],
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    num_layers: int = 1,
    **particulars: Any,
) -> KVCacheSpec:
    heads, kv_heads, head_size, block_size = shape
    return KVCacheSpec(
        attention=tuple(AttentionSpec(layer=i, scale=head_size**-0.5, **particulars) for i in range(num_layers)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        device=device or torch.device("cpu"),
    )


def _supported(plugin: Any, specs: Iterator[KVCacheSpec]) -> list[KVCacheSpec]:
    """Those of `specs` that the backend supports; when there is none, the check says nothing."""
    refusals: dict[str, None] = {}
    found = []
    for spec in specs:
        reasons = expect_reasons(plugin.supports(spec))
        if reasons:
            refusals.update(dict.fromkeys(reasons))
        else:
            found.append(spec)
    if not found:
        raise NotApplicable("; ".join(refusals))
    return found


def _anywhere(shape: tuple[int, int, int, int] = SHAPES[0], num_layers: int = 1, **particulars: Any) -> Iterator[KVCacheSpec]:
    """One spec per device and dtype."""
    for device in _devices():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield _spec(shape, dtype, device, num_layers, **particulars)


def _compare(scene: _Scene, spans: Sequence[tuple[_Sequence, int, int]], what: str, layer: int = 0, plan: Any = None) -> None:
    out = scene.run(spans, layer, plan)
    expect(out.dtype == scene.spec.dtype, f"{what}: the output is {out.dtype}, q is {scene.spec.dtype}")
    particulars = scene.spec.attention[layer]
    parts = [reference_attention(particulars, s.q[:stop], s.k[:stop], s.v[:stop], start) for s, start, stop in spans]
    expect_close(out, torch.cat(parts), scene.spec.dtype, what)


def _title(spec: KVCacheSpec) -> str:
    return f"{spec.num_heads} heads, {spec.num_kv_heads} kv heads, head size {spec.head_size}, block size {spec.block_size}"


def _run_cases(plugin: Any, specs: list[KVCacheSpec], lengths: Sequence[tuple[int, int]]) -> None:
    for spec in specs:
        scene = _Scene.build(plugin, spec, lengths)
        scene.fill()
        _compare(scene, scene.last_step(), f"(in the cache, new) {list(lengths)} with {_title(spec)}")


def check_supports_gives_reasons(plugin: Any, name: str) -> None:
    """`supports` answers every spec with a tuple of sentences."""
    for spec in _anywhere():
        expect_reasons(plugin.supports(spec))
    _supported(plugin, _anywhere())


def check_shapes(plugin: Any, name: str) -> None:
    """Decodes and chunks in one batch, for equal, grouped and single kv heads and for odd sizes."""
    _run_cases(plugin, _supported(plugin, (spec for shape in SHAPES for spec in _anywhere(shape))), MIXED)


def check_single_token(plugin: Any, name: str) -> None:
    """A batch of one sequence with one token."""
    _run_cases(plugin, _supported(plugin, _anywhere()), ((0, 1),))


def check_prompts(plugin: Any, name: str) -> None:
    """Whole prompts, at and beside the borders of blocks."""
    _run_cases(plugin, _supported(plugin, _anywhere()), ((0, 1), (0, 15), (0, 16), (0, 17), (0, 65)))


def check_decodes(plugin: Any, name: str) -> None:
    """One token each for sequences of very different lengths."""
    _run_cases(plugin, _supported(plugin, _anywhere()), ((15, 1), (16, 1), (1, 1), (300, 1), (47, 1)))


def check_window(plugin: Any, name: str) -> None:
    """A sliding window sees itself and the `window - 1` positions before it."""
    for window in (1, 5, 16, 33):
        _run_cases(plugin, _supported(plugin, _anywhere(window=window)), MIXED)


def check_alibi(plugin: Any, name: str) -> None:
    """Each head's scores fall with the distance by its own slope."""
    _run_cases(plugin, _supported(plugin, _anywhere(alibi_slopes=(0.5, 0.25, 0.125, 0.0625))), MIXED)


def check_soft_cap(plugin: Any, name: str) -> None:
    """Scores are bent by `soft_cap * tanh(score / soft_cap)`."""
    _run_cases(plugin, _supported(plugin, _anywhere(soft_cap=0.8)), MIXED)


def check_layers_are_separate(plugin: Any, name: str) -> None:
    """A layer reads its own cache and its own particulars, whatever ran before it under the same plan."""
    spec = _supported(plugin, _anywhere(num_layers=2))[0]
    scene = _Scene.build(plugin, spec, MIXED)
    other = _Scene.build(plugin, spec, MIXED)
    for sequence in other.sequences:
        sequence.v = -sequence.v
    scene.fill(layer=0)
    other.kv, other.backend = scene.kv, scene.backend
    other.fill(layer=1)
    spans = scene.last_step()
    plan = scene.backend.plan(scene.metadata(spans))
    _compare(scene, spans, "layer 0", 0, plan)
    _compare(other, other.last_step(), "layer 1", 1, plan)


def check_plan_can_be_refilled(plugin: Any, name: str) -> None:
    """`plan(metadata, into=earlier)` serves the new batch as a fresh plan does."""
    spec = _supported(plugin, _anywhere())[0]
    scene = _Scene.build(plugin, spec, ((20, 2), (37, 2), (3, 2)))
    scene.fill()
    first = [(s, s.num_cached, s.length - 1) for s in scene.sequences]
    second = [(s, s.length - 1, s.length) for s in scene.sequences]
    plan = scene.backend.plan(scene.metadata(first))
    _compare(scene, first, "the first step", plan=plan)
    plan = scene.backend.plan(scene.metadata(second), into=plan)
    _compare(scene, second, "the step whose plan was refilled", plan=plan)


def check_chunks_equal_whole(plugin: Any, name: str) -> None:
    """A prompt computed in chunks of 1, 3 and 7 tokens gives what it gives in one step."""
    spec = _supported(plugin, _anywhere())[0]
    whole = _Scene.build(plugin, spec, ((0, 37),))
    expected = whole.run(whole.last_step())
    for size in (1, 3, 7):
        scene = _Scene.build(plugin, spec, ((0, 37),))
        sequence = scene.sequences[0]
        parts = [scene.run([(sequence, i, min(i + size, 37))]) for i in range(0, 37, size)]
        expect_close(torch.cat(parts), expected.float(), spec.dtype, f"chunks of {size} against the whole prompt")


def check_copy_blocks(plugin: Any, name: str) -> None:
    """Copies read every source before any destination is written, in every layer, and touch nothing else."""
    spec = _supported(plugin, _anywhere(num_layers=2))[0]
    scene = _Scene.build(plugin, spec, ((40, 1), (20, 1)))
    for layer in (0, 1):
        scene.fill(layer)
    used = {block for s in scene.sequences for block in s.blocks}
    spare = [block for block in range(scene.num_blocks) if block not in used]
    long = scene.sequences[0]
    # A chain: the first block moves on to a spare one while the second block moves into its place.
    pairs = [(long.blocks[1], long.blocks[0]), (long.blocks[0], spare[0]), (long.blocks[2], spare[1])]
    scene.backend.copy_blocks(scene.kv, pairs)
    long.blocks = [spare[0], long.blocks[0], spare[1]]
    for layer in (0, 1):
        _compare(scene, scene.last_step(), f"layer {layer} after copying blocks {pairs}", layer)
    scene.backend.copy_blocks(scene.kv, [])


def check_swap_blocks(plugin: Any, name: str) -> None:
    """Blocks that went to another set of caches and came back elsewhere hold what they held."""
    spec = _supported(plugin, _anywhere(num_layers=2))[0]
    scene = _Scene.build(plugin, spec, ((40, 1), (20, 1)))
    for layer in (0, 1):
        scene.fill(layer)
    host = [cache.to("cpu", copy=True).fill_(GARBAGE) for cache in scene.kv]
    long = scene.sequences[0]
    out = list(zip(long.blocks, (0, 2, 1), strict=True))
    scene.backend.swap_blocks(scene.kv, host, out)
    used = set(scene.sequences[1].blocks)
    homes = [block for block in range(scene.num_blocks) if block not in used][:3]
    fresh = _Scene.build(plugin, spec, ((40, 1), (20, 1)))
    fresh.backend = scene.backend
    for layer in (0, 1):
        fresh.run([(fresh.sequences[1], 0, 20)], layer)
    scene.backend.swap_blocks(host, fresh.kv, [(slot, home) for (_, slot), home in zip(out, homes, strict=True)])
    fresh.sequences[0].blocks = homes
    for layer in (0, 1):
        _compare(fresh, fresh.last_step(), f"layer {layer} after blocks went out {out} and came back to {homes}", layer)


CHECKS = (
    check_supports_gives_reasons,
    check_single_token,
    check_prompts,
    check_decodes,
    check_shapes,
    check_window,
    check_alibi,
    check_soft_cap,
    check_layers_are_separate,
    check_plan_can_be_refilled,
    check_chunks_equal_whole,
    check_copy_blocks,
    check_swap_blocks,
)
