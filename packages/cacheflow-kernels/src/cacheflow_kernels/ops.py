"""The public operations: what each takes, checked, and the call of the implementation that serves it.

Shapes are in brackets. Every function takes `implementation`: "auto", or a name that `REGISTRY.reasons` lists. Inputs are on
one device and contiguous in the last axis. What the results mean is written in `reference`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cacheflow_kernels import reference, triton
from cacheflow_kernels.cpu import attention as cpu_attention
from cacheflow_kernels.cpu import linear as cpu_linear
from cacheflow_kernels.cpu import rows as cpu_rows
from cacheflow_kernels.cuda import attention as cuda_attention
from cacheflow_kernels.cuda import blocks as cuda_blocks
from cacheflow_kernels.cuda import rows as cuda_rows
from cacheflow_kernels.registry import Implementation, Registry

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IS_DEBUG = os.environ.get("CACHEFLOW_DEBUG") == "1"
"""Whether block numbers are checked, too. On a GPU each check waits for it."""


def _any_float(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    return () if dtype in FLOATS else (f"{dtype} is not a floating-point type",)


def _build_registry() -> Registry:
    registry = Registry()
    plain: tuple[Callable[..., Any], ...] = (
        reference.paged_attention,
        reference.store_kv,
        reference.copy_blocks,
        reference.swap_blocks,
        reference.rms_norm,
        reference.fused_add_rms_norm,
        reference.layer_norm,
        reference.rotary,
        reference.silu_and_mul,
        reference.gelu_and_mul,
        reference.row_maxima,
        reference.draw_rows,
        reference.linear,
    )
    for function in plain:
        registry.add(function.__name__, Implementation("reference", function, _any_float, priority=0))
    compiled: tuple[Callable[..., Any], ...] = (
        cpu_attention.paged_attention,
        cpu_attention.store_kv,
        cpu_attention.copy_blocks,
        cpu_rows.rms_norm,
        cpu_rows.fused_add_rms_norm,
        cpu_rows.layer_norm,
        cpu_rows.rotary,
        cpu_rows.silu_and_mul,
        cpu_rows.gelu_and_mul,
        cpu_rows.row_maxima,
        cpu_rows.draw_rows,
    )
    for function in compiled:
        registry.add(function.__name__, Implementation("cpu", function, cpu_attention.supports, priority=10))
    registry.add("linear", Implementation("cpu", cpu_linear.linear, cpu_linear.supports, priority=10))
    for op in triton.OPS:
        registry.add(op, Implementation("triton", triton.function(op), triton.reasons, priority=20))
    registry.add("paged_attention", Implementation("cuda", cuda_attention.paged_attention, cuda_attention.reasons, priority=30))
    for function in (cuda_blocks.store_kv, cuda_blocks.copy_blocks, cuda_blocks.swap_blocks):
        registry.add(function.__name__, Implementation("cuda", function, cuda_blocks.reasons, priority=30))
    in_rows: tuple[Callable[..., Any], ...] = (
        cuda_rows.rms_norm,
        cuda_rows.fused_add_rms_norm,
        cuda_rows.rotary,
        cuda_rows.silu_and_mul,
        cuda_rows.gelu_and_mul,
    )
    for function in in_rows:
        registry.add(function.__name__, Implementation("cuda", function, cuda_rows.reasons, priority=30))
    return registry


REGISTRY = _build_registry()
"""All implementations of all operations."""


def _select(op: str, implementation: str, tensor: Tensor) -> Callable[..., Any]:
    """The implementation; while torch traces, or for tensors without data, the operation that `library` registers."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
        return partial(getattr(torch.ops.cacheflow, op), implementation=implementation)
    return REGISTRY.select(op, implementation, tensor.device, tensor.dtype)


def _require(valid: bool, name: str, tensor: Tensor, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {wanted}, got {list(tensor.shape)} {tensor.dtype} on {tensor.device}.")


def _require_together(device: torch.device, **tensors: Tensor | None) -> None:
    """All must be on `device` and contiguous in the last axis."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the other arguments, got {tensor.device}.")
        if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            strides = list(tensor.stride())
            raise ValueError(f"{name} must be contiguous in its last axis, got {list(tensor.shape)} with strides {strides}.")


def _require_range(name: str, numbers: Tensor, end: int, what: str) -> None:
    """In debug mode: all must be below `end` and not negative."""
    outside = numbers[(numbers < 0) | (numbers >= end)]
    if outside.numel():
        raise ValueError(f"{name} must hold {what} from 0 to {end - 1}, got {outside.flatten()[:8].tolist()}.")


def _require_known_blocks(k_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor) -> None:
    """In debug mode: every position of every sequence must have a block that the cache has."""
    num_blocks, _, block_size, _ = k_cache.shape
    width = block_tables.shape[1]
    _require_range("seq_lens", seq_lens, width * block_size + 1, f"lengths that fit into {width} blocks of {block_size},")
    starts = query_start_loc.tolist()
    if starts[0] != 0 or starts != sorted(starts):
        raise ValueError(f"query_start_loc must begin with 0 and not fall, got {starts}.")
    is_used = torch.arange(width, device=seq_lens.device) * block_size < seq_lens[:, None]
    _require_range("block_tables", block_tables[is_used], num_blocks, "block numbers")


def _require_row_weight(name: str, weight: Tensor, x: Tensor) -> None:
    _require(weight.shape == x.shape[-1:] and weight.device == x.device, name, weight, f"[{x.shape[-1]}] on {x.device}")


def _require_pairs(pairs: Tensor) -> None:
    _require(pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype == torch.int64, "pairs", pairs, "[num_pairs, 2] int64")


def _require_cache_pair(k_cache: Tensor, v_cache: Tensor) -> None:
    _require(k_cache.ndim == 4, "k_cache", k_cache, "[num_blocks, num_kv_heads, block_size, head_size]")
    alike = v_cache.shape == k_cache.shape and v_cache.dtype == k_cache.dtype and v_cache.device == k_cache.device
    _require(alike, "v_cache", v_cache, f"like k_cache, {list(k_cache.shape)} {k_cache.dtype} on {k_cache.device}")


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Causal attention over a paged KV cache: decodes, prompt chunks and mixtures of them in one call.

    Sequence i's queries are rows `query_start_loc[i]` to `query_start_loc[i + 1]` of `q`; they are the *last* of its
    `seq_lens[i]` positions, and their own keys and values are in the cache already (`store_kv`).

    Args:
        q: `[num_tokens, num_heads, head_size]`.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_size]`; `num_kv_heads` divides `num_heads`.
        v_cache: Like `k_cache`.
        block_tables: `[num_seqs, max_num_blocks] int32`: position p of sequence i lies in block
            `block_tables[i, p // block_size]` at slot `p % block_size`; entries past its length are not read.
        seq_lens: `[num_seqs] int32`: positions in the cache, the queries' own included.
        query_start_loc: `[num_seqs + 1] int32`, not falling, from 0 to `num_tokens`.
        scale: Factor of q · k; None: `head_size ** -0.5`.
        window: Each position sees itself and the `window - 1` before it; None: all before it.
        alibi_slopes: `[num_heads] float32` (ALiBi, arXiv:2108.12409), or None.
        soft_cap: Scores become `soft_cap * tanh(score / soft_cap)`, before ALiBi's term; or None.
        implementation: "auto" or a name.

    Returns:
        `[num_tokens, num_heads, head_size]` in q's dtype.

    Raises:
        ValueError: An argument has the wrong shape or dtype; the message names it.
    """
    _require_cache_pair(k_cache, v_cache)
    _, num_kv_heads, _, head_size = k_cache.shape
    valid = q.ndim == 3 and q.shape[2] == head_size and q.shape[1] % num_kv_heads == 0
    _require(valid, "q", q, f"[num_tokens, a multiple of {num_kv_heads}, {head_size}]")
    num_seqs = seq_lens.shape[0]
    _require(seq_lens.ndim == 1 and seq_lens.dtype == torch.int32, "seq_lens", seq_lens, "[num_seqs] int32")
    valid = query_start_loc.shape == (num_seqs + 1,) and query_start_loc.dtype == torch.int32
    _require(valid, "query_start_loc", query_start_loc, f"[{num_seqs + 1}] int32")
    valid = block_tables.ndim == 2 and block_tables.shape[0] == num_seqs and block_tables.dtype == torch.int32
    _require(valid, "block_tables", block_tables, f"[{num_seqs}, max_num_blocks] int32")
    if alibi_slopes is not None:
        _require(alibi_slopes.shape == q.shape[1:2], "alibi_slopes", alibi_slopes, f"[{q.shape[1]}]")
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1, got {window}.")
    _require_together(
        q.device,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        alibi_slopes=alibi_slopes,
    )
    if IS_DEBUG:
        _require_known_blocks(k_cache, block_tables, seq_lens, query_start_loc)
    scale = head_size**-0.5 if scale is None else scale
    function = _select("paged_attention", implementation, q)
    out: Tensor = function(q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, window, alibi_slopes, soft_cap)
    return out


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, implementation: str = "auto"
) -> None:
    """Writes this step's keys and values into the cache, in place.

    Args:
        k: `[num_tokens, num_kv_heads, head_size]`.
        v: Like `k`.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_size]`.
        v_cache: Like `k_cache`.
        slot_mapping: `[num_tokens] int64`: `block * block_size + slot` of each token, all distinct; a token with a negative one
            is padding and is not stored.
        implementation: "auto" or a name.

    Raises:
        ValueError: An argument has the wrong shape or dtype; the message names it.
    """
    _require_cache_pair(k_cache, v_cache)
    num_kv_heads, head_size = k_cache.shape[1], k_cache.shape[3]
    _require(k.ndim == 3 and k.shape[1:] == (num_kv_heads, head_size), "k", k, f"[num_tokens, {num_kv_heads}, {head_size}]")
    _require(v.shape == k.shape and v.dtype == k.dtype, "v", v, f"like k, {list(k.shape)} {k.dtype}")
    valid = slot_mapping.shape == k.shape[:1] and slot_mapping.dtype == torch.int64
    _require(valid, "slot_mapping", slot_mapping, f"[{k.shape[0]}] int64")
    _require_together(k.device, k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    if IS_DEBUG:
        num_slots = k_cache.shape[0] * k_cache.shape[2]
        _require_range("slot_mapping", slot_mapping[slot_mapping >= 0], num_slots, "slots")
    _select("store_kv", implementation, k)(k, v, k_cache, v_cache, slot_mapping)


def copy_blocks(caches: Sequence[Tensor], pairs: Tensor, *, implementation: str = "auto") -> None:
    """Copies whole blocks within each cache, as if all sources were read before any write (copy-on-write).

    Args:
        caches: Each `[num_blocks, ...]`.
        pairs: `[num_pairs, 2] int64`: source and destination; destinations are distinct.
        implementation: "auto" or a name.

    Raises:
        ValueError: `pairs` has the wrong shape or dtype.
    """
    _require_pairs(pairs)
    if IS_DEBUG:
        for cache in caches:
            _require_range("pairs", pairs, cache.shape[0], "block numbers")
    if caches:
        _select("copy_blocks", implementation, caches[0])(caches, pairs)


def swap_blocks(source: Tensor, destination: Tensor, pairs: Tensor, *, implementation: str = "auto") -> None:
    """Copies whole blocks from one cache to another, which may live on another device.

    Args:
        source: `[num_blocks, ...]`.
        destination: `[its own num_blocks, ...]`, otherwise like `source`.
        pairs: `[num_pairs, 2] int64`: block of `source`, block of `destination`.
        implementation: "auto" or a name.

    Raises:
        ValueError: An argument has the wrong shape or dtype; the message names it.
    """
    _require_pairs(pairs)
    alike = destination.shape[1:] == source.shape[1:] and destination.dtype == source.dtype
    _require(alike, "destination", destination, f"[num_blocks, *{list(source.shape[1:])}] {source.dtype}")
    if IS_DEBUG:
        for column, cache in enumerate((source, destination)):
            _require_range("pairs", pairs[:, column], cache.shape[0], "block numbers")
    # Either may be on the host, while the other's device does the work.
    _select("swap_blocks", implementation, destination if source.device.type == "cpu" else source)(source, destination, pairs)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, implementation: str = "auto") -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis (RMSNorm, arXiv:1910.07467).

    Args:
        x: `[..., size]`.
        weight: `[size]`.
        eps: Added to the mean square.
        implementation: "auto" or a name.
    """
    _require_row_weight("weight", weight, x)
    _require_together(x.device, x=x, weight=weight)
    out: Tensor = _select("rms_norm", implementation, x)(x, weight, eps)
    return out


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`; either input may be overwritten.

    Args:
        x: `[..., size]`.
        residual: Like `x`.
        weight: `[size]`.
        eps: Added to the mean square.
        implementation: "auto" or a name.
    """
    _require_row_weight("weight", weight, x)
    _require(residual.shape == x.shape and residual.dtype == x.dtype, "residual", residual, f"{list(x.shape)} {x.dtype}")
    _require_together(x.device, x=x, residual=residual, weight=weight)
    out: tuple[Tensor, Tensor] = _select("fused_add_rms_norm", implementation, x)(x, residual, weight, eps)
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, implementation: str = "auto"
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis (LayerNorm, arXiv:1607.06450).

    Args:
        x: `[..., size]`.
        weight: `[size]`.
        bias: `[size]` or None.
        eps: Added to the variance.
        implementation: "auto" or a name.
    """
    _require_row_weight("weight", weight, x)
    if bias is not None:
        _require_row_weight("bias", bias, x)
    _require_together(x.device, x=x, weight=weight, bias=bias)
    out: Tensor = _select("layer_norm", implementation, x)(x, weight, bias, eps)
    return out


def rotary(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    head_size: int,
    is_neox: bool = True,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k (RoFormer, arXiv:2104.09864); either may be overwritten.

    Args:
        q: `[num_tokens, num_heads * head_size]`; rows may be strided.
        k: `[num_tokens, num_kv_heads * head_size]`; rows may be strided.
        positions: `[num_tokens] int64`.
        cos_sin: `[max_positions, rotary_size] float32`: cosines in the first half, sines in the second.
        head_size: Elements of one head; the first `rotary_size` of them turn.
        is_neox: The pairs that turn are (i, i + rotary_size / 2); otherwise (2i, 2i + 1).
        implementation: "auto" or a name.

    Returns:
        q and k, turned.
    """
    valid = positions.ndim == 1 and positions.dtype == torch.int64
    _require(valid, "positions", positions, "[num_tokens] int64")
    for name, x in (("q", q), ("k", k)):
        valid = x.ndim == 2 and x.shape[0] == positions.shape[0] and x.shape[1] % head_size == 0
        _require(valid, name, x, f"[{positions.shape[0]}, a multiple of {head_size}]")
    valid = cos_sin.ndim == 2 and cos_sin.shape[1] % 2 == 0 and cos_sin.shape[1] <= head_size
    _require(valid, "cos_sin", cos_sin, f"[max_positions, an even size up to {head_size}]")
    _require_together(q.device, q=q, k=k, positions=positions, cos_sin=cos_sin)
    out: tuple[Tensor, Tensor] = _select("rotary", implementation, q)(q, k, positions, cos_sin, head_size, is_neox)
    return out


def silu_and_mul(x: Tensor, *, implementation: str = "auto") -> Tensor:
    """`[..., 2 * size]` → `silu(x[..., :size]) * x[..., size:]`."""
    _require(x.shape[-1] % 2 == 0, "x", x, "[..., an even size]")
    _require_together(x.device, x=x)
    out: Tensor = _select("silu_and_mul", implementation, x)(x)
    return out


def gelu_and_mul(x: Tensor, *, approximate: str = "none", implementation: str = "auto") -> Tensor:
    """`[..., 2 * size]` → `gelu(x[..., :size]) * x[..., size:]`; `approximate` is "none" (erf) or "tanh"."""
    _require(x.shape[-1] % 2 == 0, "x", x, "[..., an even size]")
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}.')
    _require_together(x.device, x=x)
    out: Tensor = _select("gelu_and_mul", implementation, x)(x, approximate)
    return out


def row_maxima(x: Tensor, *, implementation: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """What greedy decoding wants of logits, in one pass over each row.

    Args:
        x: `[num_rows, size]`, at least one element a row.
        implementation: "auto" or a name.

    Returns:
        `[num_rows]` each: the largest number, float32; the first place that has it, int64; and the logarithm of the sum of all
        exponentials, float32, which is not finite if the row has a NaN or infinity.
    """
    _require(x.ndim == 2 and x.shape[1] > 0, "x", x, "[num_rows, size]")
    _require_together(x.device, x=x)
    out: tuple[Tensor, Tensor, Tensor] = _select("row_maxima", implementation, x)(x)
    return out


def draw_rows(
    x: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    numbers: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Random tokens by inversion: the place in a row of logits at which the running sum of probabilities passes a number.

    First min_p, then top_k, then top_p take places away. A draw depends on its own row and numbers only, bit for bit.

    Args:
        x: `[num_rows, size]` logits, at least one element a row.
        rows: `[num_draws] int64`, the row of each draw; a row may come more than once.
        temperatures: `[num_draws] float32`, above 0; logits are divided by them.
        numbers: `[num_draws] float64`, from 0 up to, not including, 1.
        top_k: `[num_draws] int64`: how many of the largest are left, of equals the first; all where it is 0 or less.
        top_p: `[num_draws] float64`, above 0: of what is left then, the fewest largest whose probabilities reach this share of
            it, of equals the first; all where it is 1.
        min_p: `[num_draws] float32`, up to 1: what is less likely than this share of the most likely place goes first.
        implementation: "auto" or a name.

    Returns:
        `[num_draws]` each: the places, int64; and the logarithms of their probabilities at temperature 1 among all places,
        float32, which are not finite if the row has a NaN or infinity.
    """
    _require(x.ndim == 2 and x.shape[1] > 0, "x", x, "[num_rows, size]")
    _require(rows.ndim == 1 and rows.dtype == torch.int64, "rows", rows, "[num_draws] int64")
    of_draws = {
        "temperatures": (temperatures, torch.float32),
        "numbers": (numbers, torch.float64),
        "top_k": (top_k, torch.int64),
        "top_p": (top_p, torch.float64),
        "min_p": (min_p, torch.float32),
    }
    for name, (tensor, dtype) in of_draws.items():
        if tensor is not None:
            _require(tensor.shape == rows.shape and tensor.dtype == dtype, name, tensor, f"[{len(rows)}] {dtype}")
    _require_together(x.device, x=x, rows=rows, **{name: tensor for name, (tensor, _) in of_draws.items()})
    if IS_DEBUG:
        _require_range("rows", rows, x.shape[0], "row numbers")
    out: tuple[Tensor, Tensor] = _select("draw_rows", implementation, x)(x, rows, temperatures, numbers, top_k, top_p, min_p)
    return out


LINEAR_FORMS = ("plain", "int8", "int4", "int8_dynamic")
"""How `linear` keeps a weight: as it is; as integers with a scale for each group of inputs; as bytes with a scale for each
output, to be multiplied by activations that are rounded to bytes row by row."""


def linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    form: str = "plain",
    group_size: int = 64,
    is_gated: bool = False,
    implementation: str = "auto",
) -> Callable[[Tensor], Tensor]:
    """Packs a weight once; the result is the function that multiplies by it: `x @ weight.T + bias`.

    A row's result depends on no other row, bit for bit. The weight given is not kept.

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or None.
        form: One of `LINEAR_FORMS`.
        group_size: Inputs that share a scale in the forms "int8" and "int4": a multiple of 32; 32 to 128 is usual.
        is_gated: The first half of the outputs are gates, the second half what they let through, and the result is
            `silu(first half) * second half`: the two products and the activation of a SwiGLU at once.
        implementation: "auto" or a name.

    Returns:
        Maps `[num_rows, in_features]` in the weight's dtype to `[num_rows, out_features]`, gated half as many.

    Raises:
        ValueError: An argument has the wrong shape or dtype; the message names it.
    """
    _require(weight.ndim == 2 and weight.numel() > 0, "weight", weight, "[out_features, in_features]")
    if bias is not None:
        valid = bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.device == weight.device
        _require(valid, "bias", bias, f"[{weight.shape[0]}] {weight.dtype} on {weight.device}")
    if form not in LINEAR_FORMS:
        raise ValueError(f"form must be one of {', '.join(LINEAR_FORMS)}, got {form!r}.")
    if group_size < 32 or group_size % 32:
        raise ValueError(f"group_size must be a multiple of 32 inputs, got {group_size}.")
    if is_gated and weight.shape[0] % 2:
        raise ValueError(f"is_gated needs an even number of outputs, half of them gates, got {weight.shape[0]}.")
    multiply: Callable[[Tensor], Tensor] = _select("linear", implementation, weight)(weight, bias, form, group_size, is_gated)
    return multiply
