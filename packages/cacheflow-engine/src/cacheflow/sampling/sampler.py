"""Chooses tokens: raw log probabilities, then processors, then the most likely token, a random one, or candidates for beams.

What is chosen for a row depends on that row and its request alone. This module knows no model, no cache and no text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cacheflow.errors import InvalidRequestError, RequestFailedError
from cacheflow.interfaces import ProcessorRow, Sample
from cacheflow.plugins import find_plugins, load_plugin
from cacheflow.sampling.logprobs import keep_first, logprob_entries, top_tokens
from cacheflow.sampling.randomness import uniform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cacheflow.interfaces import ProcessorContext, SampleSpec
    from cacheflow.types import Logprobs, SamplingParams

GROUP = "cacheflow.logits_processors"
BLOCK = 256
"""Weights summed at a time when a distribution is inverted: a running sum over blocks, then one within a block. For 64 rows of
49,152 a running sum over everything takes 2.3 ms, sums of blocks 0.2."""
NUM_SORTED = 512
"""Most likely tokens among which top_p is first looked for. Sorting the whole vocabulary takes ten times as long (68 ms for 64
rows of 49,152), and is left to rows whose nucleus is larger."""
LEAST_TEMPERATURE = 1e-20
"""Smaller ones would vanish in float32, and mean the same."""


RowMaxima = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""As `row_maxima`."""
DrawRows = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Of `(logits [num_rows, vocab_size], rows, temperatures, numbers, top_k, top_p, min_p)`, all but the first `[count]`: int64,
float32, float64, int64, float64 and float32. Each of the last three may be None; in it 0, 1 and 0 take nothing away.

Returns the token at which the running sum of `exp(logit / temperature)` passes `number` of the total among those that `draw`
would leave, int64; and its log probability at temperature 1 among all, float32, not finite if the row has a NaN or infinity."""


class Sampler:
    """Holds the processors of running requests, and nothing else between steps.

    Args:
        context: What processors may ask about the model.
        find_maxima: The op provider's `row_maxima`, if it has one.
        draw_rows: The op provider's, if it has one. Then both are asked for all but beams.
    """

    def __init__(
        self, context: ProcessorContext, find_maxima: RowMaxima | None = None, draw_rows: DrawRows | None = None
    ) -> None:
        self._context = context
        self._row_maxima: RowMaxima = row_maxima if find_maxima is None else find_maxima
        self._draw_rows = draw_rows
        classes = [load_plugin(GROUP, name) for name in find_plugins(GROUP)]
        self._classes = sorted(classes, key=lambda processor: -processor.priority)
        self._processors: dict[int, tuple[tuple[Any, Any], ...]] = {}

    def forget(self, request_indices: Iterable[int]) -> None:
        """Drops the processors of requests that ended."""
        for index in request_indices:
            self._processors.pop(index, None)

    def sample(self, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> list[Sample]:
        """One `Sample` per spec.

        Args:
            logits: `[num_rows, vocab_size]`, any float dtype.
            row_of_spec: The row of each spec; several may share one.
            specs: What to choose.

        Raises:
            InvalidRequestError: A request allows no token at all, or a processor refuses its parameters.
            RequestFailedError: The model's logits are not numbers.
        """
        if not specs:
            return []
        if all(self._is_plainly_greedy(spec) for spec in specs):
            return self._greedy(logits, row_of_spec, specs)
        # How a request's row is served must not depend on what else is in the step: beams are done apart.
        single = [] if self._draw_rows is None else [i for i, spec in enumerate(specs) if not spec.num_candidates]
        if not single:
            return self._sample(logits, row_of_spec, specs)
        chosen = self._choose(logits, [row_of_spec[i] for i in single], [specs[i] for i in single])
        samples = dict(zip(single, chosen, strict=True))
        beams = [i for i in range(len(specs)) if i not in samples]
        if beams:
            rows = sorted({row_of_spec[i] for i in beams})
            place = {row: number for number, row in enumerate(rows)}
            found = self._sample(_take(logits, rows), [place[row_of_spec[i]] for i in beams], [specs[i] for i in beams])
            samples.update(zip(beams, found, strict=True))
        return [samples[i] for i in range(len(specs))]

    def _sample(self, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> list[Sample]:
        """As `sample`, with everything that requests can ask for."""
        raw = logits.float()
        normaliser = raw.logsumexp(dim=-1, keepdim=True)
        _check_finite(normaliser, row_of_spec, specs)
        processed, rows, processed_normaliser = self._process(raw, normaliser, row_of_spec, specs)

        chosen: dict[int, int] = {}
        greedy = [i for i, spec in enumerate(specs) if spec.params.is_greedy and not spec.num_candidates]
        random = [i for i, spec in enumerate(specs) if not spec.params.is_greedy and not spec.num_candidates]
        if greedy:
            # Of equals, max returns the first.
            best = _take(processed, [rows[i] for i in greedy]).max(dim=-1).indices
            chosen.update(zip(greedy, best.tolist(), strict=True))
        if random:
            drawn = draw(_take(processed, [rows[i] for i in random]), [specs[i] for i in random])
            chosen.update(zip(random, drawn.tolist(), strict=True))

        single = sorted(chosen)
        samples: dict[int, Sample] = {}
        if single:
            tokens = torch.tensor([chosen[i] for i in single], device=raw.device)
            logprobs = _logprobs_at(raw, normaliser, [row_of_spec[i] for i in single], tokens)
            scores = _logprobs_at(processed, processed_normaliser, [rows[i] for i in single], tokens)
            entries = _top_logprobs(raw, normaliser, row_of_spec, specs, chosen)
            for i, score, logprob in zip(single, scores, logprobs, strict=True):
                top = entries.get(i)
                samples[i] = Sample(
                    token_ids=[chosen[i]], scores=[score], logprobs=[logprob], top_logprobs=None if top is None else [top]
                )
        beams = [i for i, spec in enumerate(specs) if spec.num_candidates]
        if beams:
            own_rows, raw_rows = [rows[i] for i in beams], [row_of_spec[i] for i in beams]
            found = _candidates(
                [specs[i] for i in beams],
                _take(processed, own_rows),
                _take(processed_normaliser, own_rows),
                _take(raw, raw_rows),
                _take(normaliser, raw_rows),
            )
            samples.update(zip(beams, found, strict=True))
        return [samples[i] for i in range(len(specs))]

    def _is_plainly_greedy(self, spec: SampleSpec) -> bool:
        """Whether the most likely token is all that is wanted, and no processor can change which it is."""
        params = spec.params
        return (
            params.is_greedy
            and params.logprobs is None
            and not spec.num_candidates
            and all(processor_class.argmax_invariant for processor_class, _ in self._processors_of(spec))
        )

    def _choose(self, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> list[Sample]:
        """As `sample` by the provider's operations: on rows as they are, on float32 copies where processors change them."""
        changed = [i for i, spec in enumerate(specs) if self._is_changed(spec)]
        unchanged = sorted(set(range(len(specs))).difference(changed))
        chosen: dict[int, tuple[int, float]] = {}
        if unchanged:
            own = [specs[i] for i in unchanged]
            found = self._choose_from(logits, [row_of_spec[i] for i in unchanged], own)
            chosen.update(zip(unchanged, found, strict=True))
            for spec, (_, score) in zip(own, found, strict=True):
                if not math.isfinite(score):
                    raise not_finite(spec)
        if changed:
            found = self._choose_processed(logits, [row_of_spec[i] for i in changed], [specs[i] for i in changed])
            chosen.update(zip(changed, found, strict=True))

        logprobs = {i: score for i, (_, score) in chosen.items()}
        # What the choice does not tell: the model's own log probabilities where it was changed, and the most likely tokens.
        scored = changed + [i for i in unchanged if specs[i].params.logprobs is not None]
        tops: dict[int, Logprobs] = {}
        if scored:
            own = [specs[i] for i in scored]
            raw, places = _take(logits, [row_of_spec[i] for i in scored]), range(len(scored))
            normaliser = self._row_maxima(raw)[2][:, None]
            _check_finite(normaliser, places, own)
            tokens = {place: chosen[i][0] for place, i in enumerate(scored)}
            values = _logprobs_at(raw, normaliser, places, torch.tensor(list(tokens.values()), device=raw.device))
            logprobs.update(zip(scored, values, strict=True))
            entries = _top_logprobs(raw, normaliser, places, own, tokens)
            tops = {scored[place]: entry for place, entry in entries.items()}
        return [
            Sample(
                token_ids=[chosen[i][0]],
                scores=[chosen[i][1]],
                logprobs=[logprobs[i]],
                top_logprobs=[tops[i]] if i in tops else None,
            )
            for i in range(len(specs))
        ]

    def _choose_processed(
        self, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]
    ) -> list[tuple[int, float]]:
        """As `_choose_from` of the rows as processors leave them."""
        processed = _take(logits, row_of_spec).to(torch.float32, copy=True)
        uses = self.uses(specs)
        for processor_class, its_rows in uses.items():
            processor_class.apply(processed, its_rows)
        found = self._choose_from(processed, range(len(specs)), specs)
        for i, (_, score) in enumerate(found):
            if not math.isfinite(score):
                is_empty = bool((processed[i] == -math.inf).all())
                raise nothing_allowed(specs[i], i, uses, logits.shape[1]) if is_empty else not_finite(specs[i])
        return found

    def _choose_from(
        self, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]
    ) -> list[tuple[int, float]]:
        """Each spec's token and its log probability in its row, which is not finite if the row is not numbers."""
        found: dict[int, tuple[int, float]] = {}
        greedy = [i for i, spec in enumerate(specs) if spec.params.is_greedy]
        if greedy:
            values, indices, normalisers = self._row_maxima(_take(logits, [row_of_spec[i] for i in greedy]))
            best = zip(indices.tolist(), (values - normalisers).tolist(), strict=True)
            found.update(zip(greedy, best, strict=True))
        random = [i for i in range(len(specs)) if i not in found]
        if random:
            drawn = self._draw(logits, [row_of_spec[i] for i in random], [specs[i] for i in random])
            found.update(zip(random, drawn, strict=True))
        return [found[i] for i in range(len(specs))]

    def _draw(self, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> list[tuple[int, float]]:
        assert self._draw_rows is not None
        params, device = [spec.params for spec in specs], logits.device
        # A filter that no row uses is left out. In a row that does not use it, it changes nothing.
        top_k = torch.tensor([p.top_k for p in params], device=device) if any(p.top_k > 0 for p in params) else None
        top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64) if any(p.top_p < 1 for p in params) else None
        min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32) if any(p.min_p for p in params) else None
        tokens, logprobs = self._draw_rows(
            logits,
            torch.tensor(row_of_spec, device=device),
            torch.tensor([max(p.temperature, LEAST_TEMPERATURE) for p in params], device=device),
            torch.from_numpy(random_numbers(specs)).to(device),
            top_k,
            None if top_p is None else top_p.to(device),
            None if min_p is None else min_p.to(device),
        )
        return list(zip(tokens.tolist(), logprobs.tolist(), strict=True))

    def _is_changed(self, spec: SampleSpec) -> bool:
        """Whether a processor may change which token is chosen."""
        is_greedy = spec.params.is_greedy
        return any(not (is_greedy and processor_class.argmax_invariant) for processor_class, _ in self._processors_of(spec))

    def _greedy(self, logits: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> list[Sample]:
        values, indices, normalisers = self._row_maxima(logits)
        tokens, logprobs = indices.tolist(), (values - normalisers).tolist()
        samples = []
        for row, spec in zip(row_of_spec, specs, strict=True):
            logprob = logprobs[row]
            if not math.isfinite(logprob):
                raise not_finite(spec)
            samples.append(Sample(token_ids=[tokens[row]], scores=[logprob], logprobs=[logprob]))
        return samples

    def _process(
        self, raw: torch.Tensor, normaliser: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]
    ) -> tuple[torch.Tensor, Sequence[int], torch.Tensor]:
        """The logits to choose from, each spec's row in them, and their normaliser; `raw` itself when nothing changes it."""
        uses = self.uses(specs)
        if not uses:
            return raw, row_of_spec, normaliser
        processed = raw[torch.tensor(row_of_spec, device=raw.device)]
        for processor_class, its_rows in uses.items():
            processor_class.apply(processed, its_rows)
        rows = range(len(specs))
        processed_normaliser = processed.logsumexp(dim=-1, keepdim=True)
        for i, value in enumerate(processed_normaliser[:, 0].tolist()):
            if value == -math.inf:
                raise nothing_allowed(specs[i], i, uses, raw.shape[1])
        _check_finite(processed_normaliser, rows, specs)
        return processed, rows, processed_normaliser

    def is_processed(self, spec: SampleSpec) -> bool:
        """Whether any processor may change what the spec chooses from."""
        return bool(self._processors_of(spec))

    def uses(self, specs: Sequence[SampleSpec]) -> dict[Any, list[ProcessorRow]]:
        """The rows that each processor is to change, in the order in which processors run; row i is spec i's."""
        uses: dict[Any, list[ProcessorRow]] = {processor_class: [] for processor_class in self._classes}
        for i, spec in enumerate(specs):
            is_greedy = spec.params.is_greedy and not spec.num_candidates
            for processor_class, processor in self._processors_of(spec):
                if not (is_greedy and processor_class.argmax_invariant):
                    row = ProcessorRow(
                        row=i,
                        processor=processor,
                        sequence_id=spec.sequence_id,
                        prompt_token_ids=spec.prompt_token_ids,
                        output_token_ids=spec.output_token_ids,
                    )
                    uses[processor_class].append(row)
        return {processor_class: rows for processor_class, rows in uses.items() if rows}

    def _processors_of(self, spec: SampleSpec) -> tuple[tuple[Any, Any], ...]:
        """The (class, instance) pairs of the spec's request, made when it is first seen."""
        found = self._processors.get(spec.request_index)
        if found is None:
            made = [(c, c.from_params(spec.params, self._context)) for c in self._classes]
            found = tuple(pair for pair in made if pair[1] is not None)
            self._processors[spec.request_index] = found
        return found


def row_maxima(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What greedy sampling needs of each row of `[num_rows, vocab_size]`, of any float dtype.

    Returns:
        `[num_rows]` each: the greatest logit in float32, the first token that has it in int64, and the log of the sum of all
        exponentials in float32; that is not finite in a row with a NaN.
    """
    raw = logits.float()
    values, indices = raw.max(dim=-1)
    return values, indices, raw.logsumexp(dim=-1)


def draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """A random token per row: temperature, min_p, top_k, top_p, then the inverse of what is left at the row's own number.

    Args:
        logits: `[num_rows, vocab_size] float32`.
        specs: One per row, with a temperature above 0 and a seed.

    Returns:
        `[num_rows] int64`.
    """
    params = [spec.params for spec in specs]
    vocab_size, device = logits.shape[1], logits.device
    temperatures = torch.tensor([max(p.temperature, LEAST_TEMPERATURE) for p in params], device=device)[:, None]
    greatest = logits.amax(dim=-1, keepdim=True)
    # Probabilities relative to the most likely token's, padded to whole blocks.
    weights = torch.zeros(len(specs), -(-vocab_size // BLOCK) * BLOCK, device=device)
    inside = weights[:, :vocab_size]
    torch.sub(logits, greatest, out=inside)
    inside.div_(temperatures).exp_()
    if any(p.min_p for p in params):
        inside.mul_(inside >= torch.tensor([p.min_p for p in params], device=device)[:, None])
    cut = [i for i, p in enumerate(params) if cuts(p, vocab_size)]
    if cut:
        kept = _nucleus(_take(logits, cut), _take(weights, cut), _take(temperatures, cut), [params[i] for i in cut])
        if len(cut) == len(params):
            inside.mul_(kept)
        else:
            inside[torch.tensor(cut, device=device)] *= kept
    return invert(weights, torch.from_numpy(random_numbers(specs)).to(device))


def cuts(params: SamplingParams, vocab_size: int) -> bool:
    """Whether top_k or top_p takes tokens away."""
    return 0 < params.top_k < vocab_size or params.top_p < 1


def random_numbers(specs: Sequence[SampleSpec]) -> NDArray[np.float64]:
    """Each spec's own random number."""
    return uniform(
        [spec.params.seed or 0 for spec in specs],
        [spec.index for spec in specs],
        [spec.position for spec in specs],
    )


def _nucleus(
    logits: torch.Tensor, weights: torch.Tensor, temperatures: torch.Tensor, params: Sequence[SamplingParams]
) -> torch.Tensor:
    """Marks the tokens that top_k and top_p leave, `[num_rows, vocab_size] bool`.

    Each leaves the first tokens in the order (most likely first, of equals the lowest id first); top_p counts probabilities
    among those that min_p and top_k left. So a row is one number: how many tokens it keeps.
    """
    vocab_size, device = logits.shape[1], logits.device
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    total = _block_ends(weights)[1][:, -1:]

    def count(rows: slice | torch.Tensor, num_sorted: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many tokens the rows keep, the logit of the last one, and whether `num_sorted` tokens were enough to tell."""
        largest = logits[rows].topk(num_sorted, dim=-1).values
        relative = ((largest - largest[:, :1]) / temperatures[rows]).exp_()
        sums = (relative * (relative >= min_p[rows])).double().cumsum(dim=-1)
        by_k = top_k[rows]
        is_within = by_k <= num_sorted
        mass = torch.where(is_within, sums.gather(1, by_k.clamp(max=num_sorted) - 1), total[rows])
        by_p = torch.where(top_p[rows] < 1, 1 + (sums < top_p[rows] * mass).sum(dim=-1, keepdim=True), vocab_size)
        is_known = is_within | ((by_k == vocab_size) & (sums[:, -1:] >= top_p[rows] * mass))
        kept = torch.minimum(by_k, by_p).clamp(max=num_sorted)
        return kept, largest.gather(1, kept - 1), is_known

    most = max(p.top_k if 0 < p.top_k <= NUM_SORTED else NUM_SORTED for p in params)
    kept, least, is_known = count(slice(None), min(most, vocab_size))
    open_rows = (~is_known[:, 0]).nonzero()[:, 0]
    if len(open_rows) and most < vocab_size:
        kept[open_rows], least[open_rows], _ = count(open_rows, vocab_size)
    return keep_first(logits, least, kept)


def _block_ends(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of blocks `[num_rows, num_blocks] float64`, and their running sums."""
    sums = weights.unflatten(-1, (-1, BLOCK)).sum(dim=-1).double()
    return sums, sums.cumsum(dim=-1)


def invert(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first token at which the running sum of weights passes `number` of the total, in the order of token ids.

    Args:
        weights: `[num_rows, whole blocks] float32`, none negative, at least one positive a row.
        numbers: `[num_rows] float64` in [0, 1).
    """
    sums, ends = _block_ends(weights)
    target = numbers[:, None] * ends[:, -1:]
    # argmax of a running sum: where its last positive term lies; rounding must not lead past it.
    block = torch.minimum(torch.searchsorted(ends, target, right=True), ends.argmax(dim=-1, keepdim=True))
    inside = weights.unflatten(-1, (-1, BLOCK))[torch.arange(len(weights), device=weights.device), block[:, 0]]
    inside_ends = inside.double().cumsum(dim=-1)
    rest = (target - (ends.gather(1, block) - sums.gather(1, block))).clamp_(min=0)
    place = torch.minimum(torch.searchsorted(inside_ends, rest, right=True), inside_ends.argmax(dim=-1, keepdim=True))
    return (block * BLOCK + place)[:, 0]


def _candidates(
    specs: Sequence[SampleSpec],
    processed: torch.Tensor,
    processed_normaliser: torch.Tensor,
    raw: torch.Tensor,
    normaliser: torch.Tensor,
) -> Iterator[Sample]:
    """For beam search: the most likely tokens of each row, fewer than asked for where fewer are allowed at all."""
    ids, values = top_tokens(processed, max(spec.num_candidates for spec in specs))
    all_scores = (values - processed_normaliser).tolist()
    all_logprobs = (raw.gather(1, ids) - normaliser).tolist()
    for row, spec in enumerate(specs):
        scores = [score for score in all_scores[row][: spec.num_candidates] if score > -math.inf]
        own_ids, count = ids[row : row + 1, : len(scores)], spec.params.logprobs
        top = None if count is None else logprob_entries(raw[row : row + 1], normaliser[row : row + 1], own_ids, [count])
        yield Sample(token_ids=own_ids[0].tolist(), scores=scores, logprobs=all_logprobs[row][: len(scores)], top_logprobs=top)


def _top_logprobs(
    raw: torch.Tensor,
    normaliser: torch.Tensor,
    row_of_spec: Sequence[int],
    specs: Sequence[SampleSpec],
    chosen: dict[int, int],
) -> dict[int, Logprobs]:
    """Entries for the specs that ask for them, by spec."""
    wanted = {i: specs[i].params.logprobs for i in chosen}
    counts = {i: count for i, count in wanted.items() if count is not None}
    if not counts:
        return {}
    rows = [row_of_spec[i] for i in counts]
    tokens = torch.tensor([[chosen[i]] for i in counts], device=raw.device)
    entries = logprob_entries(_take(raw, rows), _take(normaliser, rows), tokens, list(counts.values()))
    return dict(zip(counts, entries, strict=True))


def _logprobs_at(logits: torch.Tensor, normaliser: torch.Tensor, rows: Sequence[int], tokens: torch.Tensor) -> list[float]:
    """Of one token per row."""
    places = torch.tensor(rows, device=logits.device)
    values: list[float] = (logits[places, tokens] - normaliser[places, 0]).tolist()
    return values


def _take(matrix: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The given rows; `matrix` itself, not a copy, when they are all of it in order."""
    if len(rows) == len(matrix) and all(i == row for i, row in enumerate(rows)):
        return matrix
    return matrix.index_select(0, torch.tensor(rows, device=matrix.device))


def nothing_allowed(
    spec: SampleSpec, row: int, uses: Mapping[Any, Sequence[ProcessorRow]], vocab_size: int
) -> InvalidRequestError:
    """What to raise when processors left no token."""
    names = ", ".join(c.__name__ for c, its_rows in uses.items() if any(its.row == row for its in its_rows))
    return InvalidRequestError(
        f"The request allows no token after {spec.position} tokens: all of the model's {vocab_size} are excluded by {names}. "
        "Allow more, or lower min_tokens."
    )


def not_finite(spec: SampleSpec) -> RequestFailedError:
    """What to raise when the model's logits are not numbers."""
    return RequestFailedError(
        f"The logits after {len(spec.prompt_token_ids)} prompt and {spec.position} output tokens are not numbers: the model "
        "overflowed. Try --dtype bfloat16 or float32, and check the checkpoint."
    )


def _check_finite(normaliser: torch.Tensor, row_of_spec: Sequence[int], specs: Sequence[SampleSpec]) -> None:
    finite = torch.isfinite(normaliser[:, 0]).tolist()
    for row, spec in zip(row_of_spec, specs, strict=True):
        if not finite[row]:
            raise not_finite(spec)
