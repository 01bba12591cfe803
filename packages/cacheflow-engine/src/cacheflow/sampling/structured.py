"""`Structured`: the logits processor that leaves only tokens with which the text can still become what was asked for.

It owns compiled grammars and, for each sequence, how far its text has come; both can be made again from the request. What
grammars there may be is `text.structure`'s. llguidance is imported when a request first asks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from cacheflow.errors import InvalidRequestError
from cacheflow.kvcache.plan import num_usable_cpus
from cacheflow.sampling.transfer import all_to_device
from cacheflow.text.structure import grammar_of, limits, load_library, refusal
from cacheflow.types import SamplingParams, StructuredOutput

if TYPE_CHECKING:
    from typing_extensions import Self

    from cacheflow.config import EngineConfig
    from cacheflow.interfaces import ProcessorContext, ProcessorRow

MAX_COMPILED = 128
"""Grammars kept per tokenizer; the one not used for longest goes first."""
MAX_THREADS = 8
"""That masks of a step are computed by."""


class Structured:
    """Structured output: `SamplingParams.structured`. It comes last, so that nothing opens what it has closed."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = -100
    argmax_invariant: ClassVar[bool] = False
    EXAMPLES: ClassVar[tuple[SamplingParams, ...]] = (
        SamplingParams(structured=StructuredOutput(choices=("red", "green", "blue"))),
        SamplingParams(structured=StructuredOutput(regex="[a-z]{2,}"), n=2, min_tokens=3),
        SamplingParams(structured=StructuredOutput(json_object=True), ignore_eos=True),
    )

    def __init__(self, structure: StructuredOutput, grammars: _Grammars, ends: Sequence[int], max_sequences: int) -> None:
        self._structure = structure
        self._grammars = grammars
        self._start = grammars.compiled(structure)
        self._ends = list(ends)
        self._max_sequences = max_sequences
        self._sequences: OrderedDict[int, _Progress] = OrderedDict()

    @classmethod
    def supports(cls, config: EngineConfig) -> tuple[str, ...]:
        """Any engine, if the library is there."""
        try:
            load_library()
        except InvalidRequestError as error:
            return (str(error),)
        return ()

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """None without `structured`."""
        if params.structured is None:
            return None
        if not context.eos_token_ids:
            raise InvalidRequestError("Structured output needs an end-of-text token; this model has none.", param="structured")
        ends = {token for token in (*context.eos_token_ids, *params.stop_token_ids) if token < context.vocab_size}
        # Beam search makes new sequences in every step, out of the last ones.
        return cls(params.structured, _grammars_of(context), sorted(ends), 2 * params.num_sequences)

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Sets what can't follow to -inf: the masks of a step are made together, and laid over the logits in one go."""
        from llguidance.numpy import fill_next_token_bitmask_par

        grammars: _Grammars = rows[0].processor._grammars
        progress = [row.processor._advance(row.sequence_id, row.output_token_ids) for row in rows]
        mask = np.zeros((len(rows), -(-grammars.vocab_size // 32)), np.int32)
        running = [(state.matcher, i) for i, state in enumerate(progress) if not state.has_ended]
        if running:
            fill_next_token_bitmask_par(grammars.executor, running, mask)
        allowed = np.unpackbits(mask.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little").view(bool)
        for i, (row, state) in enumerate(zip(rows, progress, strict=True)):
            own: Structured = row.processor
            if state.matcher.is_error():
                raise refusal(own._structure, state.matcher.get_error())
            allowed[i, own._ends] = state.has_ended or state.matcher.is_accepting()
        places, closed = all_to_device((np.array([row.row for row in rows]), ~allowed), logits.device)
        logits[places] = logits[places].masked_fill_(closed, -math.inf)
        for row, state in zip(rows, progress, strict=True):
            if state.has_ended:
                _open(logits[row.row], row.processor._ends)

    def _advance(self, sequence_id: int, output: Sequence[int]) -> _Progress:
        """The sequence's progress behind `output`. What does not follow from the state that is there is made afresh."""
        progress = self._sequences.pop(sequence_id, None)
        if progress is None or list(output[: len(progress.token_ids)]) != progress.token_ids:
            progress = _Progress(self._start.deep_copy())
        self._sequences[sequence_id] = progress
        if len(self._sequences) > self._max_sequences:
            self._sequences.popitem(last=False)
        progress.advance(list(output[len(progress.token_ids) :]), self._ends)
        return progress


@dataclass(eq=False)
class _Progress:
    """How far one sequence has come in its grammar.

    Attributes:
        matcher: The library's state behind `token_ids`.
        token_ids: What it has seen.
        has_ended: Only the end can follow: the text is whole, or the sequence was begun without the grammar and left it.
    """

    matcher: Any
    token_ids: list[int] = field(default_factory=list)
    has_ended: bool = False

    def advance(self, token_ids: list[int], ends: Sequence[int]) -> None:
        text_ids = token_ids[: next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))]
        if not self.has_ended:
            num_taken = self.matcher.try_consume_tokens(text_ids) if text_ids else 0
            self.has_ended = num_taken < len(token_ids) or (self.matcher.is_stopped() and not self.matcher.is_error())
        self.token_ids += token_ids


class _Grammars:
    """The grammars that requests to one model have asked for, compiled for its tokens."""

    def __init__(self, context: ProcessorContext) -> None:
        library = load_library()
        self.vocab_size = context.vocab_size
        self.executor = library.LLExecutor(min(MAX_THREADS, num_usable_cpus()))
        self._tokenizer = library.LLTokenizer(_Vocabulary(context), context.vocab_size, list(context.eos_token_ids))
        self._matcher = library.LLMatcher
        self._compiled: OrderedDict[StructuredOutput, Any] = OrderedDict()

    def compiled(self, structure: StructuredOutput) -> Any:
        """A matcher at the beginning of the text, to be copied.

        Raises:
            InvalidRequestError: The grammar is none, or too large.
        """
        matcher = self._compiled.pop(structure, None)
        if matcher is None:
            matcher = self._matcher(self._tokenizer, grammar_of(structure), log_level=0, limits=limits())
            if matcher.is_error():
                raise refusal(structure, matcher.get_error())
        self._compiled[structure] = matcher
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return matcher


class _Vocabulary:
    """What the library wants to know of a tokenizer: `TokenizerWrapper` in its own terms."""

    is_tokenizer_wrapper = True

    def __init__(self, context: ProcessorContext) -> None:
        self._context = context
        self.eos_token_id = context.eos_token_ids[0]
        self.bos_token_id = None
        self.tokens = context.token_bytes()[: context.vocab_size]
        self.special_token_ids = sorted(token for token in context.special_token_ids() if token < context.vocab_size)

    def __call__(self, text: str) -> list[int]:
        return self._context.encode(text)


_all_grammars: WeakKeyDictionary[ProcessorContext, _Grammars] = WeakKeyDictionary()


def _grammars_of(context: ProcessorContext) -> _Grammars:
    grammars = _all_grammars.get(context)
    if grammars is None:
        grammars = _all_grammars[context] = _Grammars(context)
    return grammars


def _open(row: torch.Tensor, ends: Sequence[int]) -> None:
    """The text is whole: if another processor forbids every end, as `min_tokens` does, one must be allowed all the same."""
    if bool((row[ends] == -math.inf).all()):
        row[ends] = 0.0
