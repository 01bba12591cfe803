"""The engine's own logits processors: what sampling parameters ask for beyond temperature and the top-k family.

Each changes the rows that it is given and knows neither the rest of the batch nor how a token is then chosen.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from cacheflow.errors import InvalidRequestError
from cacheflow.sampling.transfer import all_to_device, to_device

if TYPE_CHECKING:
    from typing_extensions import Self

    from cacheflow.interfaces import ProcessorContext, ProcessorRow
    from cacheflow.types import SamplingParams


def _check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    outside = [token for token in token_ids if token >= vocab_size]
    if outside:
        raise InvalidRequestError(f"{name} has token id {outside[0]}; the model has ids 0 to {vocab_size - 1}.", param=name)


def _exclude(logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int]) -> None:
    """Sets one logit of each row to -inf; a row may come several times."""
    if rows:
        at_rows, at_ids = all_to_device((np.array(rows, np.int64), np.array(token_ids, np.int64)), logits.device)
        logits[at_rows, at_ids] = -math.inf


class Penalties:
    """Presence and frequency penalties on the output, repetition penalty (arXiv:1909.05858) on prompt and output."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 300
    argmax_invariant: ClassVar[bool] = False

    def __init__(self, presence: float, frequency: float, repetition: float, max_sequences: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._repetition = repetition
        self._max_sequences = max_sequences
        self._tallies: OrderedDict[int, _Tally] = OrderedDict()

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """None when every penalty is at its neutral value."""
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        # Beam search makes new sequences in every step, out of the last ones.
        return None if penalties == (0, 0, 1) else cls(*penalties, max_sequences=2 * params.num_sequences)

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Gathers what all rows have seen, and changes it in one go."""
        if not rows:
            return
        seen_rows, seen_ids, factors, amounts = [], [], [], []
        for row in rows:
            own: Penalties = row.processor
            tally = own._tally_of(row)
            ids, counts = np.array(tally.token_ids), np.array(tally.counts)
            amount = np.where(counts > 0, own._presence + own._frequency * counts, 0.0)
            seen_rows.append(np.full(len(ids), row.row))
            seen_ids.append(ids)
            factors.append(np.full(len(ids), own._repetition, dtype=np.float32))
            amounts.append(amount.astype(np.float32))
        arrays = [np.concatenate(part) for part in (seen_rows, seen_ids, factors, amounts)]
        at_rows, at_ids, factor, subtracted = all_to_device(arrays, logits.device)
        values = logits[at_rows, at_ids]
        logits[at_rows, at_ids] = torch.where(values > 0, values / factor, values * factor) - subtracted

    def _tally_of(self, row: ProcessorRow) -> _Tally:
        """The sequence's tally, brought up to its output. One that does not fit the output is made afresh."""
        tally, output = self._tallies.pop(row.sequence_id, None), row.output_token_ids
        if tally is None or list(output[: len(tally.output)]) != tally.output:
            tally = _Tally(row.prompt_token_ids if self._repetition != 1 else ())
        self._tallies[row.sequence_id] = tally
        if len(self._tallies) > self._max_sequences:
            self._tallies.popitem(last=False)
        tally.add(output[len(tally.output) :])
        return tally


class _Tally:
    """Tokens that a sequence has seen, and how often its output has each of them: counting anew would take longer each step.

    Args:
        prompt_token_ids: Seen, if the prompt is to count.

    Attributes:
        token_ids: Each once.
        counts: Beside them.
        output: What has been counted.
    """

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self.token_ids = array("q", self._places)
        self.counts = array("q", [0] * len(self._places))
        self.output: list[int] = []

    def add(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            place = self._places.setdefault(token, len(self.token_ids))
            if place == len(self.token_ids):
                self.token_ids.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self.output += token_ids


class LogitBias:
    """Adds fixed values to the logits of some tokens."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 200
    argmax_invariant: ClassVar[bool] = False

    def __init__(self, token_ids: Sequence[int], values: Sequence[float]) -> None:
        self._token_ids = np.array(token_ids, np.int64)
        self._values = np.array(values, np.float32)

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """None without `logit_bias`."""
        if not params.logit_bias:
            return None
        _check_ids("logit_bias", list(params.logit_bias), context.vocab_size)
        return cls(list(params.logit_bias), list(params.logit_bias.values()))

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Adds each row's values."""
        for row in rows:
            own: LogitBias = row.processor
            token_ids, values = all_to_device((own._token_ids, own._values), logits.device)
            logits[row.row].index_add_(0, token_ids, values)


class AllowedTokenIds:
    """Leaves only the given tokens."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 100
    argmax_invariant: ClassVar[bool] = False

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = np.array(token_ids, np.int64)

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """None without `allowed_token_ids`."""
        if params.allowed_token_ids is None:
            return None
        _check_ids("allowed_token_ids", params.allowed_token_ids, context.vocab_size)
        return cls(params.allowed_token_ids)

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Sets all other logits to -inf."""
        for row in rows:
            own: AllowedTokenIds = row.processor
            token_ids = to_device(own._token_ids, logits.device)
            values = logits[row.row, token_ids]
            logits[row.row].fill_(-math.inf)
            logits[row.row, token_ids] = values


class BadWords:
    """Never lets the last token of a forbidden word follow the others, as it stands and with a space before it."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 90
    argmax_invariant: ClassVar[bool] = False

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self._single = sorted({word[0] for word in words if len(word) == 1})
        self._by_previous: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for word in words:
            if len(word) > 1:
                self._by_previous[word[-2]].append(word)

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """None without `bad_words`."""
        if not params.bad_words:
            return None
        variants = {tuple(context.encode(text)) for word in params.bad_words for text in (word, " " + word.lstrip(" "))}
        return cls(sorted(variants - {()}))

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Only tokens of the output count as the beginning of a word."""
        banned_rows: list[int] = []
        banned_ids: list[int] = []
        for row in rows:
            own: BadWords = row.processor
            output = row.output_token_ids
            begun = own._by_previous.get(output[-1], ()) if output else ()
            banned = own._single + [word[-1] for word in begun if tuple(output[1 - len(word) :]) == word[:-1]]
            banned_rows += [row.row] * len(banned)
            banned_ids += banned
        _exclude(logits, banned_rows, banned_ids)


class MinTokens:
    """Hides what would end the sequence until it has `min_tokens` tokens."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 80
    argmax_invariant: ClassVar[bool] = False

    def __init__(self, min_tokens: int, token_ids: Sequence[int]) -> None:
        self._min_tokens = min_tokens
        self._token_ids = list(token_ids)

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """None when no token ends the sequence, or none is asked for before the end."""
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(context.eos_token_ids))
        ends = {token for token in ends if token < context.vocab_size}
        if not params.min_tokens or not ends:
            return None
        return cls(params.min_tokens, sorted(ends))

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Sets the ends' logits to -inf."""
        early = [row for row in rows if len(row.output_token_ids) < row.processor._min_tokens]
        ends = [row.processor._token_ids for row in early]
        at_rows = [row.row for row, its_ends in zip(early, ends, strict=True) for _ in its_ends]
        _exclude(logits, at_rows, [token for its_ends in ends for token in its_ends])
