"""Chooses tokens on the device: nothing is read back before all of a step's choices are made, and then all at once.

The same choices as `sampler` makes, in an order of operations that suits a GPU: sorting is cheap there, waiting is not. Beam
search, which needs its candidates on the host, is left to `sampler`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cacheflow.interfaces import Sample
from cacheflow.sampling.sampler import BLOCK, LEAST_TEMPERATURE, cuts, invert, not_finite, nothing_allowed, random_numbers
from cacheflow.sampling.transfer import Download, all_to_device, to_device

if TYPE_CHECKING:
    from cacheflow.interfaces import ProcessorRow, SampleSpec
    from cacheflow.sampling.sampler import Sampler

MAX_SORTED_ELEMENTS = 1 << 23
"""Logits sorted at a time, about 200 MiB with their order and running sums. Not measured."""


@dataclass(frozen=True)
class Choices:
    """What was chosen for each spec of a step, perhaps still being computed.

    Attributes:
        token_ids: `[num_specs] int64` on the device; of beams, which have several, the best.
    """

    token_ids: torch.Tensor
    _specs: Sequence[SampleSpec]
    _uses: Mapping[Any, Sequence[ProcessorRow]]
    _vocab_size: int
    _download: Download | None
    _ready: Mapping[int, Sample]

    def samples(self) -> list[Sample]:
        """One per spec: waits for the device.

        Raises:
            InvalidRequestError: A request allows no token at all.
            RequestFailedError: The model's logits are not numbers.
        """
        samples = dict(self._ready)
        if self._download is not None:
            samples.update(self._read(self._download.result().tolist()))
        return [samples[i] for i in range(len(samples))]

    def _read(self, values: list[float]) -> dict[int, Sample]:
        specs = {i: spec for i, spec in enumerate(self._specs) if i not in self._ready}
        count = len(specs)
        tokens, scores, logprobs, normalisers, processed = (values[i * count : (i + 1) * count] for i in range(5))
        for row, spec in enumerate(specs.values()):
            if processed[row] == -math.inf and math.isfinite(normalisers[row]):
                raise nothing_allowed(spec, row, self._uses, self._vocab_size)
            if not (math.isfinite(normalisers[row]) and math.isfinite(processed[row])):
                raise not_finite(spec)
        start, most = 5 * count, _most_wanted(list(specs.values()), self._vocab_size)
        samples = {}
        for row, (i, spec) in enumerate(specs.items()):
            token, top = int(tokens[row]), None
            if spec.params.logprobs is not None:
                ids, best = values[start : start + most], values[start + most : start + 2 * most]
                start += 2 * most
                wanted = spec.params.logprobs
                top = [{token: logprobs[row], **{int(t): value for t, value in zip(ids[:wanted], best[:wanted], strict=True)}}]
            samples[i] = Sample(token_ids=[token], scores=[scores[row]], logprobs=[logprobs[row]], top_logprobs=top)
        return samples


def choose(sampler: Sampler, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> Choices:
    """Starts one choice per spec.

    Args:
        sampler: Holds the processors of running requests, and makes the choices for beams.
        logits: `[num_rows, vocab_size]`, any float dtype.
        row_of_spec: The row of each spec; several may share one.
        specs: What to choose, at least one thing.

    Raises:
        InvalidRequestError: A processor refuses its parameters; or as `Sampler.sample`, for beams.
        RequestFailedError: As `Sampler.sample`, for beams.
    """
    beams = [i for i, spec in enumerate(specs) if spec.num_candidates]
    if not beams:
        return _choose(sampler, logits, row_of_spec, specs)
    found = sampler.sample(logits, [row_of_spec[i] for i in beams], [specs[i] for i in beams])
    ready = dict(zip(beams, found, strict=True))
    token_ids = to_device(np.array([ready[i].token_ids[0] if i in ready else 0 for i in range(len(specs))]), logits.device)
    others = [i for i in range(len(specs)) if i not in ready]
    if not others:
        return Choices(token_ids, specs, {}, logits.shape[1], None, ready)
    rest = _choose(sampler, logits, [row_of_spec[i] for i in others], [specs[i] for i in others])
    token_ids.index_copy_(0, to_device(np.array(others), logits.device), rest.token_ids)
    return Choices(token_ids, specs, rest._uses, logits.shape[1], rest._download, ready)


def _choose(sampler: Sampler, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> Choices:
    device, vocab_size = logits.device, logits.shape[1]
    raw = logits.float()
    if list(row_of_spec) != list(range(len(raw))):
        raw = raw.index_select(0, to_device(np.array(row_of_spec), device))
    normaliser = raw.logsumexp(dim=-1, keepdim=True)
    uses = sampler.uses(specs)
    processed, processed_normaliser = raw, normaliser
    if uses:
        processed = raw.clone()
        for processor_class, rows in uses.items():
            processor_class.apply(processed, rows)
        processed_normaliser = processed.logsumexp(dim=-1, keepdim=True)
    # Of equals, max returns the first.
    token_ids = processed.max(dim=-1).indices
    random = [i for i, spec in enumerate(specs) if not spec.params.is_greedy]
    if random:
        places = to_device(np.array(random), device)
        drawn = _draw(processed if len(random) == len(specs) else processed.index_select(0, places), [specs[i] for i in random])
        token_ids = token_ids.index_copy(0, places, drawn)
    at = token_ids[:, None]
    columns = (
        token_ids,
        (processed.gather(1, at) - processed_normaliser)[:, 0],
        (raw.gather(1, at) - normaliser)[:, 0],
        normaliser[:, 0],
        processed_normaliser[:, 0],
    )
    # In float64 token ids and float32 values are what they were.
    told = [column.double() for column in columns]
    wanted = [i for i, spec in enumerate(specs) if spec.params.logprobs is not None]
    most = _most_wanted(specs, vocab_size)
    if most:
        places = to_device(np.array(wanted), device)
        for part in places.split(max(1, MAX_SORTED_ELEMENTS // vocab_size)):
            values, ids = raw.index_select(0, part).sort(dim=-1, descending=True, stable=True)
            best = values[:, :most] - normaliser.index_select(0, part)
            told.append(torch.cat((ids[:, :most].double(), best.double()), dim=1).flatten())
    return Choices(token_ids, specs, uses, vocab_size, Download(torch.cat(told)), {})


def _most_wanted(specs: Sequence[SampleSpec], vocab_size: int) -> int:
    """Most likely tokens that some spec wants to be told."""
    return min(vocab_size, max((spec.params.logprobs or 0 for spec in specs), default=0))


def _draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """As `sampler.draw`: a random token per row of `[num_rows, vocab_size] float32`."""
    params, vocab_size, device = [spec.params for spec in specs], logits.shape[1], logits.device
    temperatures, min_p, top_p, top_k, numbers = all_to_device(
        (
            np.array([[max(p.temperature, LEAST_TEMPERATURE)] for p in params], np.float32),
            np.array([[p.min_p] for p in params], np.float32),
            np.array([[p.top_p] for p in params], np.float64),
            np.array([[p.top_k if 0 < p.top_k < vocab_size else vocab_size] for p in params], np.int64),
            random_numbers(specs),
        ),
        device,
    )
    weights = torch.zeros(len(specs), -(-vocab_size // BLOCK) * BLOCK, device=device)
    inside = weights[:, :vocab_size]
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=inside)
    inside.div_(temperatures).exp_()
    if any(p.min_p for p in params):
        inside.mul_(inside >= min_p)
    cut = [i for i, p in enumerate(params) if cuts(p, vocab_size)]
    for rows in to_device(np.array(cut), device).split(max(1, MAX_SORTED_ELEMENTS // vocab_size)) if cut else ():
        own = inside.index_select(0, rows)
        kept = _nucleus(logits.index_select(0, rows), own, top_k.index_select(0, rows), top_p.index_select(0, rows))
        inside.index_copy_(0, rows, own.mul_(kept))
    return invert(weights, numbers)


def _nucleus(logits: torch.Tensor, weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Marks the tokens that top_k and top_p leave, `[num_rows, vocab_size] bool`, as `sampler` does."""
    ids = logits.sort(dim=-1, descending=True, stable=True).indices
    sums = weights.gather(1, ids).double().cumsum(dim=-1)
    mass = sums.gather(1, top_k - 1)
    by_p = torch.where(top_p < 1, 1 + (sums < top_p * mass).sum(dim=-1, keepdim=True), logits.shape[1])
    is_kept = torch.arange(logits.shape[1], device=logits.device) < torch.minimum(top_k, by_p)
    return torch.empty_like(is_kept).scatter_(1, ids, is_kept)
