"""Beam search over one request: which continuations live on, which are finished, and when to stop.

The procedure is that of Hugging Face transformers' `generate` (the same texts in the same order), which follows the beam
search with length normalisation of Wu et al., arXiv:1609.08144. It knows sequences and scores, not blocks: `advance` says which
parent each surviving beam continues, and the scheduler forks and frees block tables accordingly.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field

from cacheflow.interfaces import Sample
from cacheflow.scheduling.sequence import Sequence
from cacheflow.types import Logprobs


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam.

    Attributes:
        score: Log probability divided by length to the power of the length penalty.
        token_ids: The output.
        cumulative_logprob: Raw, in nats.
        logprobs: One entry per token, when asked for.
        is_stopped: Whether its last token ended it; otherwise it reached the length limit.
    """

    score: float
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[Logprobs]
    is_stopped: bool


@dataclass(frozen=True, slots=True)
class Continuation:
    """One more token on a beam: the parent's place among the live sequences, and the token."""

    parent: int
    token_id: int
    score: float
    logprob: float
    top_logprobs: Logprobs | None


@dataclass(slots=True)
class BeamSearch:
    """The state of one request's search.

    Attributes:
        width: Beams.
        length_penalty: Exponent of the length in a score.
        early_stopping: As in `SamplingParams`.
        max_tokens: Most output tokens.
        stop_token_ids: Ids that finish a beam.
        finished: The best finished beams so far, best first; at most `width`.
        is_done: Whether the search has ended.
    """

    width: int
    length_penalty: float
    early_stopping: bool | str
    max_tokens: int
    stop_token_ids: frozenset[int]
    finished: list[Hypothesis] = field(default_factory=list)
    is_done: bool = False

    @property
    def num_candidates(self) -> int:
        """Continuations looked at per beam: however many of them finish it, `width` are left that don't."""
        return self.width + len(self.stop_token_ids)

    def advance(self, beams: ReadOnly[Sequence], samples: ReadOnly[Sample]) -> list[Continuation]:
        """Takes the most likely continuations of each live beam; returns those that live on, best first. None: it is done."""
        candidates = (
            Continuation(parent, token_id, beam.score + score, logprob, sample.top_logprobs[i] if sample.top_logprobs else None)
            for parent, (beam, sample) in enumerate(zip(beams, samples, strict=True))
            for i, (token_id, score, logprob) in enumerate(zip(sample.token_ids, sample.scores, sample.logprobs, strict=True))
            if score > float("-inf")
        )
        best = sorted(candidates, key=lambda c: c.score, reverse=True)
        num_tokens = len(beams[0].output_token_ids) + 1
        is_last = num_tokens >= self.max_tokens
        live = [] if is_last else [c for c in best if c.token_id not in self.stop_token_ids][: self.width]
        # Only the first `width` may finish: the others are there as a reserve for living on.
        ended = [c for c in best[: self.width] if is_last or c.token_id in self.stop_token_ids]
        if not (self.early_stopping is True and len(self.finished) == self.width):
            self.finished += [self._hypothesis(beams[c.parent], c, num_tokens) for c in ended]
        self.finished = sorted(self.finished, key=lambda h: h.score, reverse=True)[: self.width]
        self.is_done = not live or self._cannot_improve(live[0].score, num_tokens)
        return [] if self.is_done else live

    def _hypothesis(self, beam: Sequence, last: Continuation, num_tokens: int) -> Hypothesis:
        return Hypothesis(
            score=last.score / num_tokens**self.length_penalty,
            token_ids=[*beam.output_token_ids, last.token_id],
            cumulative_logprob=beam.cumulative_logprob + last.logprob,
            logprobs=[] if last.top_logprobs is None else [*beam.logprobs, last.top_logprobs],
            is_stopped=last.token_id in self.stop_token_ids,
        )

    def _cannot_improve(self, best_score: float, num_tokens: int) -> bool:
        if len(self.finished) < self.width:
            return False
        if self.early_stopping is True:
            return True
        # "never" asks whether any future length could still win; otherwise the present length stands for the future.
        is_bound = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_tokens if is_bound else num_tokens
        return bool(best_score / length**self.length_penalty <= self.finished[-1].score)
