"""One sequence on its way from token ids to what the user sees of it: text, ids and log probabilities that always agree.

Tokens are given out ("released") only together with their whole text. Those whose text is an incomplete character, or might
become part of a stop string, are held back until more tokens or the end of the sequence decide. It knows no requests.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from cacheflow.text.detokenizer import Detokenizer
from cacheflow.text.stop_strings import StopFinder, StopMatch
from cacheflow.types import FINISH_STOP, CompletionOutput, Logprobs, SamplingParams, SequenceUpdate


class _Boundary(NamedTuple):
    """A place where the sequence could be cut so that text and tokens agree."""

    num_tokens: int
    num_chars: int
    cumulative_logprob: float


class SequenceAssembler:
    """Collects the updates of one sequence.

    Args:
        detokenizer: A fresh one.
        params: Of the request.

    Attributes:
        finish_reason: None while it runs.
        stop_reason: The stop string or the stop token id that ended it, or None.
        met_stop_string: A stop string ended it, of which the engine may not know.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.met_stop_string = False
        self._params = params
        self._detokenizer = detokenizer
        self._finder = StopFinder(tuple(params.stop)) if params.stop else None
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] | None = None if params.logprobs is None else []
        self._text = ""
        self._cumulative_logprob = 0.0
        # Characters still to come that belong to the first `min_tokens` tokens.
        self._num_exempt_chars = 0
        self._released = _Boundary(0, 0, 0.0)
        self._held: deque[_Boundary] = deque()

    @property
    def num_tokens(self) -> int:
        """How many tokens have come, those held back among them."""
        return len(self._token_ids)

    def extend(self, update: SequenceUpdate) -> None:
        """Takes what one step added; nothing once the sequence has finished."""
        if self.finish_reason is not None:
            return
        new_ids = update.new_token_ids
        # The engine ends a text only for its last token: end of text or a stop token, whose own text is not wanted.
        num_text_tokens = len(new_ids) - (update.finish_reason == FINISH_STOP)
        for position, (token_id, cumulative_logprob) in enumerate(zip(new_ids, _running_sums(update), strict=True)):
            self._token_ids.append(token_id)
            if self._logprobs is not None and update.new_logprobs is not None:
                self._logprobs.append(update.new_logprobs[position])
            self._cumulative_logprob = cumulative_logprob
            if position < num_text_tokens:
                text = self._detokenizer.add(token_id)
                if text and self._append(text):
                    return
            self._release()
        if update.finish_reason is not None:
            self.finish(update.finish_reason, update.stop_reason)

    def finish(self, reason: str, stop_reason: int | None = None) -> None:
        """Gives out all that is held back: no more tokens will come. Nothing once the sequence has finished."""
        if self.finish_reason is not None:
            return
        text = self._detokenizer.flush()
        if text and self._append(text):
            return
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self._release_all()

    def output(self, index: int) -> CompletionOutput:
        """All that has been released so far."""
        num_tokens, num_chars, cumulative_logprob = self._released
        return CompletionOutput(
            index=index,
            text=self._text[:num_chars],
            token_ids=self._token_ids[:num_tokens],
            cumulative_logprob=cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs[:num_tokens],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _append(self, text: str) -> bool:
        """Adds the last token's text; whether a stop string has ended the sequence with it."""
        self._text += text
        if self._finder is None:
            return False
        num_beyond_minimum = len(self._token_ids) - self._params.min_tokens
        if num_beyond_minimum <= 0:
            return False
        num_exempt, self._num_exempt_chars = self._num_exempt_chars, 0
        match = self._finder.feed(text[num_exempt:])
        if match is None:
            return False
        self._cut(match, len(self._text) - len(text) + num_exempt + match.end)
        return True

    def _cut(self, match: StopMatch, end: int) -> None:
        self._text = self._text[: end if self._params.include_stop_str_in_output else end - len(match.stop)]
        self.finish_reason = FINISH_STOP
        self.stop_reason = match.stop
        self.met_stop_string = True
        self._release_all()

    def _release(self) -> None:
        """Gives out the tokens whose text is certain."""
        if self._detokenizer.is_complete:
            boundary = _Boundary(len(self._token_ids), len(self._text), self._cumulative_logprob)
            if self._finder is None:
                self._released = boundary
                return
            self._held.append(boundary)
        elif len(self._token_ids) == self._params.min_tokens:
            self._num_exempt_chars = 1  # The incomplete character that the last exempt token begins.
        if self._finder is not None:
            num_certain = len(self._text) - self._finder.num_held
            while self._held and self._held[0].num_chars <= num_certain:
                self._released = self._held.popleft()

    def _release_all(self) -> None:
        self._released = _Boundary(len(self._token_ids), len(self._text), self._cumulative_logprob)
        self._held.clear()


def _running_sums(update: SequenceUpdate) -> list[float]:
    """The cumulative log probability behind each new token; without the single ones, the update's for all of them."""
    new_ids, new_logprobs = update.new_token_ids, update.new_logprobs
    if len(new_ids) < 2 or new_logprobs is None:
        return [update.cumulative_logprob] * len(new_ids)
    sums = [update.cumulative_logprob]
    # From the end, so that the last one is exactly what the engine says.
    for token_id, entry in zip(reversed(new_ids), reversed(new_logprobs), strict=True):
        sums.append(sums[-1] - entry[token_id])
    return sums[-2::-1]
