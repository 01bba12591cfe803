"""Every operation in plain torch: the specification that each implementation is measured against.

Written to be read, not to be fast. Arithmetic is in float32 (float64 for float64 inputs), rounded to the input's dtype once,
at the end. This module knows nothing of devices, dispatch or engines. Arguments are as in `ops`, which checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its blocks (PagedAttention, arXiv:2309.06180)."""
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[i], starts[i + 1]
        if start == end:
            continue
        k, v = (_gather(cache, block_tables[i], seq_len) for cache in (k_cache, v_cache))
        out[start:end] = _attend(q[start:end], k, v, scale, window, alibi_slopes, soft_cap).to(q.dtype)
    return out


def _gather(cache: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
    """One sequence's keys or values, `[num_kv_heads, seq_len, head_size]`."""
    _, num_kv_heads, block_size, head_size = cache.shape
    num_blocks = -(-seq_len // block_size)
    blocks = cache[block_table[:num_blocks].long()]
    return blocks.transpose(0, 1).reshape(num_kv_heads, num_blocks * block_size, head_size)[:, :seq_len]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, alibi_slopes: Tensor | None, soft_cap: float | None
) -> Tensor:
    """One sequence: q `[num_queries, num_heads, head_size]` are the last `num_queries` of the positions in k and v."""
    num_queries, num_heads, _ = q.shape
    num_kv_heads, seq_len, _ = k.shape
    k, v = (_wide(x).repeat_interleave(num_heads // num_kv_heads, dim=0) for x in (k, v))
    scores = torch.einsum("qhd,hkd->hqk", _wide(q), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    key_positions = torch.arange(seq_len, device=q.device)
    distance = (key_positions[-num_queries:, None] - key_positions)[None]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,hkd->qhd", probabilities, v)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes each token's key and value at its slot, in place; a negative slot is padding."""
    block_size = k_cache.shape[2]
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    blocks, offsets = slot_mapping[rows] // block_size, slot_mapping[rows] % block_size
    k_cache[blocks, :, offsets] = k[rows].to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v[rows].to(v_cache.dtype)


def copy_blocks(caches: Sequence[Tensor], pairs: Tensor) -> None:
    """Copies blocks within each cache, as if all sources were read before any write."""
    for cache in caches:
        cache[pairs[:, 1]] = cache[pairs[:, 0]]


def swap_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """Copies blocks from one cache to another, which may be on another device."""
    blocks = source[pairs[:, 0].to(source.device)]
    destination[pairs[:, 1].to(destination.device)] = blocks.to(destination.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) over the last axis."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, rounded to the inputs' dtype, and its RMSNorm."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (arXiv:1607.06450) over the last axis."""
    wide = _wide(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * _wide(weight)
    return (out if bias is None else out + _wide(bias)).to(x.dtype)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, head_size: int, is_neox: bool) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (RoFormer, arXiv:2104.09864)."""
    cos, sin = (half[:, None, :] for half in cos_sin[positions].chunk(2, dim=-1))
    return _rotate(q, cos, sin, head_size, is_neox), _rotate(k, cos, sin, head_size, is_neox)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, is_neox: bool) -> Tensor:
    heads = _wide(x).unflatten(-1, (-1, head_size))
    rotary_size = 2 * cos.shape[-1]
    turning, rest = heads[..., :rotary_size], heads[..., rotary_size:]
    if is_neox:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1).flatten(-2).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """SwiGLU's product (arXiv:2002.05202): `silu(first half) * second half`."""
    gate, up = _wide(x).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """GeGLU's product (arXiv:2002.05202): `gelu(first half) * second half`."""
    gate, up = _wide(x).chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate=approximate) * up).to(x.dtype)


def row_maxima(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the largest number, where it is first, and the logarithm of the sum of all exponentials."""
    wide = x.float()
    values = wide.amax(dim=1)
    return values, (wide == values[:, None]).int().argmax(dim=1), wide.logsumexp(dim=1)


def draw_rows(
    x: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    numbers: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each of `rows` the place at which the running sum of `exp(x / temperature)` passes `number` of the total.

    min_p comes first, then top_k, then top_p among what these left. The latter two leave the first places in the order (larger
    first, of equals the lowest place first): so many, and as few as reach that share of what is there.

    Returns:
        The places, and the logarithms of their probabilities at temperature 1, everything left in.
    """
    wide = x[rows].double()
    weights = ((wide - wide.amax(dim=1, keepdim=True)) / temperatures[:, None].double()).exp()
    if min_p is not None:
        weights = weights * (weights >= min_p[:, None])
    if top_k is not None or top_p is not None:
        order = wide.argsort(dim=1, descending=True, stable=True)
        sorted_weights = weights.gather(1, order)
        if top_k is not None:
            limits = torch.where((top_k > 0) & (top_k < x.shape[1]), top_k, x.shape[1])
            sorted_weights = sorted_weights * (torch.arange(x.shape[1], device=x.device) < limits[:, None])
        if top_p is not None:
            ends = sorted_weights.cumsum(dim=1)
            reached = (ends < top_p[:, None] * ends[:, -1:]).roll(1, dims=1)
            reached[:, 0] = True
            sorted_weights = torch.where(reached | (top_p[:, None] >= 1), sorted_weights, 0.0)
        weights = torch.zeros_like(weights).scatter_(1, order, sorted_weights)
    ends = weights.cumsum(dim=1)
    tokens = torch.searchsorted(ends, numbers[:, None] * ends[:, -1:], right=True)
    # Rounding must not lead past the last place of any weight.
    tokens = torch.minimum(tokens, ends.argmax(dim=1, keepdim=True))
    return tokens[:, 0], wide.log_softmax(dim=1).gather(1, tokens)[:, 0].float()


def linear(weight: Tensor, bias: Tensor | None, form: str, group_size: int, is_gated: bool) -> Callable[[Tensor], Tensor]:
    """`x @ weight.T + bias`, with the weight quantised as `form` says, and gated in the end.

    A quantised weight is kept as integers, each in a byte, and dequantised by every call.
    """
    offset = 0.0 if bias is None else _wide(bias)
    if form == "int8_dynamic":
        matrix, scales = quantise_rows(rotate_blocks(weight))
    elif form == "plain":
        matrix = weight.clone()
    else:
        groups = quantise_groups(weight, 8 if form == "int8" else 4, group_size)

    def multiply(x: Tensor) -> Tensor:
        wide = _wide(x)
        if form == "int8_dynamic":
            whole, row_scales = quantise_rows(rotate_blocks(x))
            # Sums of products of bytes are exact in float64, which torch multiplies fast.
            y = (whole.double() @ matrix.double().T).to(wide.dtype) * scales * row_scales[:, None]
        elif form == "plain":
            y = wide @ matrix.to(wide.dtype).T
        else:
            y = wide @ dequantise_groups(*groups, group_size).to(wide.dtype).T
        y = y + offset
        if is_gated:
            gate, up = y.chunk(2, dim=-1)
            y = torch.nn.functional.silu(gate) * up
        return y.to(x.dtype)

    return multiply


ROTATED_BLOCK = 64


def rotate_blocks(x: Tensor) -> Tensor:
    """Each whole 64 neighbours in a row times the Hadamard matrix over 8, in float32; a rest stays as it is.

    Products of rows that were both turned are what they were. Activations have a few channels that are far larger than the
    others; turned, they are spread over 64, and one scale a row suits all (QuaRot, arXiv:2404.00456). On SmolLM2-135M bytes
    without it cost 4.1 % of perplexity, with it 0.4 %.
    """
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < ROTATED_BLOCK:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    end = x.shape[1] // ROTATED_BLOCK * ROTATED_BLOCK
    turned = x[:, :end].float().unflatten(1, (-1, ROTATED_BLOCK)) @ (matrix / ROTATED_BLOCK**0.5)
    return torch.cat((turned.flatten(1), x[:, end:].float()), dim=1)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as signed bytes and one float32 scale: `[num_rows, size] int8`, `[num_rows] float32`."""
    wide = x.float()
    top = wide.abs().amax(dim=1)
    factor = torch.where(top > 0, 127 / top, 0.0)
    return (wide * factor[:, None]).round().to(torch.int8), top / 127


def quantise_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers with a scale for each `group_size` neighbours in a row; the last group may be shorter.

    8 bits: the number that is largest in magnitude becomes 127 or -127. 4 bits: a 0 stands for the group's minimum; either the
    group's range is divided by 15, or its largest magnitude by 8 on one side of zero and 7 on the other, whichever is nearer.
    These are GGUF's Q8_0, Q4_1 and Q4_0, so that what such a file holds (groups of 32) comes back bit for bit.

    Returns:
        `[out_features, in_features] int8`, and for 4 bits from 0 to 15; `[out_features, num_groups] float16`, the scales; the
        minimums like them, None for 8 bits.
    """
    size = weight.shape[1]
    # What fills the last group must not widen its range.
    padded = torch.cat((weight.float(), weight[:, -1:].float().expand(-1, -size % group_size)), dim=1)
    groups = padded.unflatten(1, (-1, group_size))
    if bits == 8:
        scales = (groups.abs().amax(dim=2) / 127).half()
        whole = (groups / torch.where(scales != 0, scales, 1.0).float()[..., None]).round().clamp(-127, 127)
        return whole.to(torch.int8).flatten(1)[:, :size], scales, None
    lowest, highest = groups.amin(dim=2), groups.amax(dim=2)
    extreme = torch.where(-lowest > highest, lowest, highest)
    best = _nearest_of_16(groups, ((highest - lowest) / 15).half(), lowest.half())
    other = _nearest_of_16(groups, (extreme / -8).half(), extreme.half())
    is_nearer = other[3] < best[3]
    whole = torch.where(is_nearer[..., None], other[0], best[0])
    scales, minimums = (torch.where(is_nearer, other[i], best[i]) for i in (1, 2))
    return whole.flatten(1)[:, :size], scales, minimums


def _nearest_of_16(groups: Tensor, scales: Tensor, minimums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers from 0 to 15 that come nearest with these scales and minimums, both again, and the squared error."""
    scale, minimum = scales.float()[..., None], minimums.float()[..., None]
    whole = ((groups - minimum) / torch.where(scale != 0, scale, 1.0)).round().clamp(0, 15)
    return whole.to(torch.int8), scales, minimums, (whole * scale + minimum - groups).square().sum(dim=2)


def dequantise_groups(whole: Tensor, scales: Tensor, minimums: Tensor | None, group_size: int) -> Tensor:
    """The float32 weight that `quantise_groups` stands for."""
    size = whole.shape[1]
    weight = whole.float() * scales.float().repeat_interleave(group_size, dim=1)[:, :size]
    return weight if minimums is None else weight + minimums.float().repeat_interleave(group_size, dim=1)[:, :size]
