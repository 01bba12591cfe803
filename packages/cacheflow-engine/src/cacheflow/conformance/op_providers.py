"""Conformance of `cacheflow.op_providers`: every operation against its definition in float32.

An error is RMS(out - reference) / RMS(reference), with one limit per dtype. Says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cacheflow.conformance.verdict import NotApplicable, expect, expect_close, expect_reasons
from cacheflow.interfaces import OpSpec

NUM_ROWS = (1, 3, 17)
SIZES = (64, 576, 7)
"""Elements of a row; the last is too odd for any vector width."""


def _specs() -> Iterator[OpSpec]:
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield OpSpec(dtype=dtype, device=device)


def _providers(plugin: Any) -> list[tuple[OpSpec, Any]]:
    """An instance for each device and dtype that the provider supports."""
    refusals: dict[str, None] = {}
    found = []
    for spec in _specs():
        reasons = expect_reasons(plugin.supports(spec))
        if reasons:
            refusals.update(dict.fromkeys(reasons))
        else:
            found.append((spec, plugin(spec)))
    if not found:
        raise NotApplicable("; ".join(refusals))
    return found


class _Draw:
    """Random tensors of a spec's dtype, from a fixed seed."""

    def __init__(self, spec: OpSpec) -> None:
        self._spec = spec
        self._generator = torch.Generator().manual_seed(2)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(device=self._spec.device, dtype=self._spec.dtype)


def _expect_result(out: torch.Tensor, reference: torch.Tensor, spec: OpSpec, what: str) -> None:
    expect(out.dtype == spec.dtype, f"{what}: the output is {out.dtype}, the input {spec.dtype}")
    expect_close(out, reference, spec.dtype, what)


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32."""
    x = x.float()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.float()


def reference_rotary(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head_size: int, is_neox: bool
) -> torch.Tensor:
    """Each pair of elements of each head turned by its angle, one pair at a time, in float32."""
    heads = x.float().reshape(x.shape[0], -1, head_size).clone()
    half = cos_sin.shape[1] // 2
    for pair in range(half):
        first, second = (pair, pair + half) if is_neox else (2 * pair, 2 * pair + 1)
        cos, sin = cos_sin[positions, pair, None], cos_sin[positions, half + pair, None]
        a, b = heads[..., first].clone(), heads[..., second].clone()
        heads[..., first] = a * cos - b * sin
        heads[..., second] = b * cos + a * sin
    return heads.reshape(x.shape)


def check_supports_gives_reasons(plugin: Any, name: str) -> None:
    """`supports` answers every dtype and device with a tuple of sentences."""
    _providers(plugin)


def check_linear(plugin: Any, name: str) -> None:
    """`x @ weight.T + bias`, with and without bias, for one row and for many."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for in_features, out_features in ((64, 96), (576, 64), (33, 7)):
            weight = draw(out_features, in_features)
            for bias in (None, draw(out_features)):
                apply = ops.linear(weight.clone(), None if bias is None else bias.clone())
                for rows in NUM_ROWS:
                    x = draw(rows, in_features)
                    reference = x.float() @ weight.float().T + (0 if bias is None else bias.float())
                    what = f"linear {in_features} to {out_features}, {rows} rows, {'no bias' if bias is None else 'bias'}"
                    _expect_result(apply(x), reference, spec, what)


def check_gated_linear(plugin: Any, name: str) -> None:
    """`silu(first half of the outputs) * second half`, with and without bias."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for in_features, out_features in ((64, 96), (33, 14)):
            weight, x = draw(out_features, in_features) / in_features**0.5, draw(17, in_features)
            for bias in (None, draw(out_features)):
                gate, up = (x.float() @ weight.float().T + (0 if bias is None else bias.float())).chunk(2, dim=1)
                out = ops.linear(weight.clone(), None if bias is None else bias.clone(), is_gated=True)(x)
                what = f"gated linear {in_features} to {out_features}, {'no bias' if bias is None else 'bias'}"
                _expect_result(out, gate / (1 + (-gate).exp()) * up, spec, what)


_MAX_QUANTISATION_ERRORS = {"int8": 0.01, "int4": 0.12, "int8_dynamic": 0.02}
"""RMS of what quantising random normal weights, and for the last one rows too, may cost, relative to the product's own."""


def check_quantised_linear(plugin: Any, name: str) -> None:
    """Every form, from weights of the spec's dtype and from float32 ones, near the product that is not quantised."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for form, limit in _MAX_QUANTISATION_ERRORS.items():
            for in_features, out_features in ((576, 64), (100, 37)):
                weight, bias, x = draw(out_features, in_features), draw(out_features), draw(17, in_features)
                reference = x.float() @ weight.float().T + bias.float()
                for given in (weight.clone(), weight.float()):
                    out = ops.linear(given, bias.clone(), form=form)(x)
                    what = f"{form} linear {in_features} to {out_features}"
                    expect(out.dtype == spec.dtype, f"{what}: the output is {out.dtype}, the input {spec.dtype}")
                    error = float((out.float() - reference).square().mean().sqrt() / reference.square().mean().sqrt())
                    expect(error <= limit, f"{what}: it is off by {error:.4f} of the product's size; {limit} is allowed")


def check_rms_norm(plugin: Any, name: str) -> None:
    """RMSNorm, without changing its input."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for size in SIZES:
            for rows in NUM_ROWS:
                x, weight = draw(rows, size), draw(size)
                before = x.clone()
                _expect_result(
                    ops.rms_norm(x, weight, 1e-5), reference_rms_norm(x, weight, 1e-5), spec, f"rms_norm [{rows}, {size}]"
                )
                expect(torch.equal(x, before), f"rms_norm [{rows}, {size}] changed its input")


def check_fused_add_rms_norm(plugin: Any, name: str) -> None:
    """`(rms_norm(x + residual), x + residual)`."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for size in SIZES:
            for rows in NUM_ROWS:
                x, residual, weight = draw(rows, size), draw(rows, size), draw(size)
                total = x.float() + residual.float()
                out, new_residual = ops.fused_add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
                what = f"fused_add_rms_norm [{rows}, {size}]"
                _expect_result(new_residual, total, spec, f"{what}, the new residual")
                _expect_result(out, reference_rms_norm(total, weight, 1e-6), spec, what)


def check_layer_norm(plugin: Any, name: str) -> None:
    """LayerNorm, with and without bias."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for size in SIZES:
            for bias in (None, draw(size)):
                x, weight = draw(5, size), draw(size)
                wide = x.float()
                centred = wide - wide.mean(dim=-1, keepdim=True)
                reference = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.float()
                reference = reference if bias is None else reference + bias.float()
                _expect_result(ops.layer_norm(x, weight, bias, 1e-5), reference, spec, f"layer_norm [5, {size}]")


def check_rotary(plugin: Any, name: str) -> None:
    """Both pairings, whole and partial heads, grouped kv heads, rows that are columns of a wider tensor."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for head_size, rotary_size in ((64, 64), (64, 32), (80, 20)):
            angles = torch.outer(torch.arange(50.0), 10.0 ** -torch.linspace(0, 3, rotary_size // 2))
            cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(spec.device)
            for rows in NUM_ROWS:
                positions = torch.arange(rows, device=spec.device) * 7 % 50
                for is_neox in (True, False):
                    q, k, _ = draw(rows, 8 * head_size).split([4 * head_size, 2 * head_size, 2 * head_size], dim=1)
                    expected = [reference_rotary(x, positions, cos_sin, head_size, is_neox) for x in (q, k)]
                    out = ops.rotary(q, k, positions, cos_sin, head_size, is_neox)
                    pairing = "(i, i + half)" if is_neox else "(2i, 2i + 1)"
                    for which, got, wanted in zip(("q", "k"), out, expected, strict=True):
                        what = f"rotary of {which}, pairs {pairing}, {rotary_size} of {head_size} elements, {rows} rows"
                        _expect_result(got, wanted, spec, what)


def check_silu_and_mul(plugin: Any, name: str) -> None:
    """`silu(first half) * second half`."""
    for spec, ops in _providers(plugin):
        draw = _Draw(spec)
        for size in SIZES:
            for rows in NUM_ROWS:
                x = draw(rows, 2 * size)
                gate, up = x.float().split(size, dim=1)
                _expect_result(ops.silu_and_mul(x), gate / (1 + (-gate).exp()) * up, spec, f"silu_and_mul [{rows}, 2 * {size}]")


def check_row_maxima(plugin: Any, name: str) -> None:
    """If it is there: the greatest logit, the first place that has it, and the log of the sum of exponentials."""
    for spec, ops in _providers(plugin):
        if not hasattr(ops, "row_maxima"):
            raise NotApplicable("it has no row_maxima, which is optional")
        draw = _Draw(spec)
        for size in SIZES:
            for rows in NUM_ROWS:
                # Few different numbers, so that the greatest is there more than once.
                x = (draw(rows, size) * 3).round()
                values, indices, normalisers = ops.row_maxima(x)
                what = f"row_maxima [{rows}, {size}]"
                expect(torch.equal(values, x.float().amax(dim=1)), f"{what}: not each row's greatest number in float32")
                places = (x == x.amax(dim=1, keepdim=True)).int().argmax(dim=1)
                expect(torch.equal(indices, places), f"{what}: not the first place that has it")
                expect(normalisers.dtype == torch.float32, f"{what}: the normalisers are {normalisers.dtype}, not float32")
                expect_close(normalisers, x.float().logsumexp(dim=1), torch.float32, f"{what}, the normalisers")
        x = draw(2, 64)
        x[1, 40] = float("nan")
        finite = ops.row_maxima(x)[2].isfinite().tolist()
        expect(finite == [True, False], f"row_maxima: the second row has a NaN, and which normalisers are finite: {finite}")


def check_draw_rows(plugin: Any, name: str) -> None:
    """If it is there: the token at which the running sum of probabilities passes the number, and its log probability."""
    for spec, ops in _providers(plugin):
        if not hasattr(ops, "draw_rows"):
            raise NotApplicable("it has no draw_rows, which is optional")
        draw = _Draw(spec)
        for size in SIZES:
            x = draw(3, size) * 3
            device = x.device
            rows = torch.arange(30, device=device) % 3
            temperatures = torch.tensor([0.3, 1.0, 2.5], device=device).repeat_interleave(10)
            numbers = torch.arange(30, dtype=torch.float64, device=device) / 30
            tokens, logprobs = ops.draw_rows(x, rows, temperatures, numbers, None, None, None)
            wide = x[rows].double()
            ends = (wide / temperatures[:, None].double()).softmax(dim=1).cumsum(dim=1)
            ends = torch.nn.functional.pad(ends, (1, 0))
            before, behind = (ends.gather(1, (tokens + k)[:, None])[:, 0] for k in (0, 1))
            # At a border, sums in float32 may choose either neighbour.
            is_right = (before <= numbers + 1e-5) & (behind >= numbers - 1e-5)
            expect(bool(is_right.all()), f"draw_rows [3, {size}]: not where the running sum passes the number")
            expected = wide.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0].float()
            expect_close(logprobs, expected, torch.float32, f"draw_rows [3, {size}], the log probabilities")
        _check_filters(spec, ops)


_FILTERED = (
    ((0, 1.0, 0.0), (4, 1, 3, 2)),
    ((2, 1.0, 0.0), (4, 0, 3, 0)),
    ((0, 0.65, 0.0), (4, 0, 3, 0)),
    ((0, 0.75, 0.0), (4, 0, 3, 2)),
    ((0, 1.0, 0.45), (4, 0, 3, 2)),
    ((9, 0.43, 0.45), (4, 0, 0, 0)),
    ((2, 0.55, 0.0), (4, 0, 0, 0)),
    ((3, 0.5, 0.0), (4, 0, 3, 0)),
)
"""(top_k, top_p, min_p), and what they leave of four tokens with 40, 10, 30 and 20 % of the probability."""


def _check_filters(spec: OpSpec, ops: Any) -> None:
    count, device = 500, spec.device
    numbers = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count
    x = torch.full((1, 300), -torch.inf)
    places = torch.tensor([3, 90, 110, 270])
    x[0, places] = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    x = torch.cat((x, torch.zeros(1, 300))).to(device=device, dtype=spec.dtype)
    rows, ones = torch.zeros(count, dtype=torch.int64, device=device), torch.ones(count, device=device)
    for (top_k, top_p, min_p), weights in _FILTERED:
        filters = (rows + top_k, ones.double() * top_p, ones * min_p)
        tokens = ops.draw_rows(x, rows, ones, numbers, *filters)[0].cpu()
        often = torch.bincount(tokens, minlength=300)[places].double() / count
        wanted = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        what = f"draw_rows with top_k {top_k}, top_p {top_p} and min_p {min_p}"
        # bfloat16 logits are off by less than 1 %.
        is_right = bool(((often - wanted).abs() < 0.01).all())
        expect(is_right, f"{what} draws four tokens with shares of {often.tolist()}, expected {wanted.tolist()}")
    for name, one_filter, num_left in (
        ("top_k", (rows + 7, None, None), 7),
        ("top_p", (None, ones.double() * 0.249, None), 75),
    ):
        last = int(ops.draw_rows(x, rows + 1, ones, numbers, *one_filter)[0].max())
        expect(last == num_left - 1, f"draw_rows with {name} draws token {last} of 300 equals, {num_left} of which are left")


CHECKS = (
    check_supports_gives_reasons,
    check_linear,
    check_gated_linear,
    check_quantised_linear,
    check_rms_norm,
    check_fused_add_rms_norm,
    check_layer_norm,
    check_rotary,
    check_silu_and_mul,
    check_row_maxima,
    check_draw_rows,
)
