"""Quantised matrices in plain torch: how numbers become small integers, and a product that works anywhere.

It knows neither models nor files. What a form means is said in `interfaces.LINEAR_FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from cacheflow.interfaces import QUANTISATION_GROUP

_ROTATED_BLOCK = 64


@dataclass(frozen=True)
class LinearForms:
    """How a model keeps its matrices; each is one of `interfaces.LINEAR_FORMS`.

    Attributes:
        layers: Those of its layers.
        head: That which makes logits, whose errors nothing behind it evens out.
    """

    layers: str = "plain"
    head: str = "plain"


FORMS = {
    "none": LinearForms(),
    "int8": LinearForms("int8", "int8"),
    "int4": LinearForms("int4", "int8"),
    "int8-dynamic": LinearForms("int8_dynamic", "int8_dynamic"),
}
"""By the `quantization` option."""


def quantised_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, form: str, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`x @ weight.T + bias`: each weight is kept in a byte, and every call makes `dtype` or float32 numbers of them again.

    Args:
        weight: `[out_features, in_features]`, any floating-point dtype.
        bias: `[out_features]` of `dtype`, or None.
        form: Of `interfaces.LINEAR_FORMS`, but not "plain".
        dtype: Of the rows that are multiplied, and of the result.
    """
    if form != "int8_dynamic":
        groups = quantise_groups(weight, form)
        return lambda x: functional.linear(x, dequantise_groups(*groups).to(dtype), bias)
    whole, column_scales = quantise_rows(rotate_blocks(weight))

    def multiply(x: torch.Tensor) -> torch.Tensor:
        integers, row_scales = quantise_rows(rotate_blocks(x))
        y = functional.linear(integers.float(), whole.float()) * column_scales * row_scales[:, None]
        return (y if bias is None else y + bias).to(dtype)

    return multiply


def quantise_groups(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Integers with a scale for each `QUANTISATION_GROUP` neighbours in a row; the last group may be shorter.

    "int8": the number that is largest in magnitude becomes 127 or -127. "int4": a 0 stands for the group's minimum; either the
    group's range is divided by 15, or its largest magnitude by 8 on one side of zero and 7 on the other, whichever is nearer.
    GGUF's Q8_0, Q4_1 and Q4_0 are made like these, so that what such a file holds comes back bit for bit.

    Returns:
        `[out_features, in_features] int8`, for "int4" from 0 to 15; `[out_features, num_groups] float16`, the scales; the
        minimums like them, None for "int8".
    """
    size = weight.shape[1]
    # What fills the last group must not widen its range.
    padded = torch.cat((weight.float(), weight[:, -1:].float().expand(-1, -size % QUANTISATION_GROUP)), dim=1)
    groups = padded.unflatten(1, (-1, QUANTISATION_GROUP))
    if form == "int8":
        scales = (groups.abs().amax(dim=2) / 127).half()
        whole = (groups / torch.where(scales != 0, scales, 1.0).float()[..., None]).round().clamp(-127, 127)
        return whole.to(torch.int8).flatten(1)[:, :size].contiguous(), scales, None
    lowest, highest = groups.amin(dim=2), groups.amax(dim=2)
    extreme = torch.where(-lowest > highest, lowest, highest)
    best = _nearest_of_16(groups, ((highest - lowest) / 15).half(), lowest.half())
    other = _nearest_of_16(groups, (extreme / -8).half(), extreme.half())
    is_nearer = other[3] < best[3]
    whole = torch.where(is_nearer[..., None], other[0], best[0])
    scales, minimums = (torch.where(is_nearer, other[i], best[i]) for i in (1, 2))
    return whole.flatten(1)[:, :size].contiguous(), scales, minimums


def _nearest_of_16(
    groups: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The numbers from 0 to 15 that come nearest with these scales and minimums, both again, and the squared error."""
    scale, minimum = scales.float()[..., None], minimums.float()[..., None]
    whole = ((groups - minimum) / torch.where(scale != 0, scale, 1.0)).round().clamp(0, 15)
    return whole.to(torch.int8), scales, minimums, (whole * scale + minimum - groups).square().sum(dim=2)


def dequantise_groups(whole: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor | None) -> torch.Tensor:
    """The float32 numbers that `quantise_groups` stands for."""
    size = whole.shape[1]
    weight = whole.float() * scales.float().repeat_interleave(QUANTISATION_GROUP, dim=1)[:, :size]
    if minimums is None:
        return weight
    return weight + minimums.float().repeat_interleave(QUANTISATION_GROUP, dim=1)[:, :size]


def rotate_blocks(x: torch.Tensor) -> torch.Tensor:
    """Each whole 64 neighbours in a row times the Hadamard matrix over 8, in float32; a rest stays as it is.

    Products of rows that were both turned are what they were. Activations have a few channels that are far larger than the
    others; turned, they are spread over 64, and one scale a row suits all (QuaRot, arXiv:2404.00456). On SmolLM2-135M bytes
    without it cost 4.1 % of perplexity, with it 0.4 %.
    """
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < _ROTATED_BLOCK:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    end = x.shape[1] // _ROTATED_BLOCK * _ROTATED_BLOCK
    turned = x[:, :end].float().unflatten(1, (-1, _ROTATED_BLOCK)) @ (matrix / _ROTATED_BLOCK**0.5)
    return torch.cat((turned.flatten(1), x[:, end:].float()), dim=1)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as signed bytes and one float32 scale: `[num_rows, size] int8`, `[num_rows] float32`."""
    wide = x.float()
    top = wide.abs().amax(dim=1)
    factor = torch.where(top > 0, 127 / top, 0.0)
    return (wide * factor[:, None]).round().to(torch.int8), top / 127
