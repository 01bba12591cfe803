"""A request inside the engine and its sequences: the scheduler's mutable state. It knows no blocks and no text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cacheflow.interfaces import RequestView, SampleSpec
from cacheflow.types import EngineRequest, Logprobs, RequestSummary

if TYPE_CHECKING:
    from cacheflow.scheduling.beam_search import BeamSearch


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream of a request.

    Attributes:
        id: Unique in the engine's life.
        index: Its number within the request.
        token_ids: Prompt and output.
        output_token_ids: The output alone.
        num_computed_tokens: How many of `token_ids` have their keys and values in the cache.
        cumulative_logprob: Sum of the raw log probabilities of the output, in nats.
        logprobs: One entry per output token, when asked for; kept for beam search only: other sequences send theirs at once.
        score: Beam search's: the sum of log probabilities after processors.
        specs: What it asks of each step once it decodes: always the same, as the lists in it grow with the sequence.
        following_specs: Likewise of steps that follow another, made when there is one.
    """

    id: int
    index: int
    token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    cumulative_logprob: float = 0.0
    logprobs: list[Logprobs] = field(default_factory=list)
    score: float = 0.0
    specs: tuple[SampleSpec, ...] = ()
    following_specs: tuple[SampleSpec, ...] = ()

    @property
    def num_remaining_tokens(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed_tokens

    def append(self, token_id: int, logprob: float) -> None:
        """One more output token."""
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        self.cumulative_logprob += logprob

    def fork(self, sequence_id: int, index: int) -> Sequence:
        """A copy that goes its own way from here."""
        return Sequence(
            id=sequence_id,
            index=index,
            token_ids=self.token_ids.copy(),
            output_token_ids=self.output_token_ids.copy(),
            num_computed_tokens=self.num_computed_tokens,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs.copy(),
            score=self.score,
        )


@dataclass(slots=True, eq=False)
class Request:
    """A request that the scheduler has accepted.

    Attributes:
        source: What the client sent.
        arrival_index: Counts the engine's requests.
        max_tokens: Most output tokens of a sequence, the context's limit included.
        stop_token_ids: Ids that end a sequence.
        key: The policy's, computed once.
        sequences: Those that are alive. One until the prompt is computed; then `params.num_sequences`.
        beam: The state of its beam search, or None.
        is_running: Whether it holds blocks.
        has_forked: Whether the prompt has been computed once, so that `sequences` are all there are.
        num_cached_tokens: Prompt tokens found in the prefix cache when it was first admitted; -1 before.
        num_scored_tokens: Prompt positions whose log probabilities were sent, the first one's None included.
        num_output_tokens: Generated so far, over all sequences that ever were.
        pooled: For the task "embed": the sum of the hidden states of the tokens computed since it got its blocks, or the last.
    """

    source: EngineRequest
    arrival_index: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    sequences: list[Sequence]
    key: Any = None
    beam: BeamSearch | None = None
    is_running: bool = False
    has_forked: bool = False
    num_cached_tokens: int = -1
    num_scored_tokens: int = 0
    num_output_tokens: int = 0
    pooled: list[float] = field(default_factory=list)

    def __lt__(self, other: Request) -> bool:
        return bool((self.key, self.arrival_index) < (other.key, other.arrival_index))

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.source.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the prompt and of all outputs; it does not change while the request waits."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def is_embedding(self) -> bool:
        """Whether it wants a vector, for which every prompt position is computed, and no token."""
        return self.source.task == "embed"

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether prompt positions are still to be scored: such a request reads no cached block."""
        return self.source.params.prompt_logprobs is not None and self.num_scored_tokens < self.num_prompt_tokens

    @property
    def summary(self) -> RequestSummary:
        """What an `EngineView` tells of it."""
        source = self.source
        return RequestSummary(
            request_id=source.request_id,
            client_id=source.client_id,
            is_running=self.is_running,
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=max(s.num_computed_tokens for s in self.sequences),
            num_output_tokens=self.num_output_tokens,
            num_sequences=len(self.sequences) if self.has_forked else source.params.num_sequences,
            arrival_s=source.arrival_s,
        )

    @property
    def view(self) -> RequestView:
        """What a policy sees."""
        source = self.source
        return RequestView(
            request_id=source.request_id,
            client_id=source.client_id,
            priority=source.priority,
            arrival_s=source.arrival_s,
            arrival_index=self.arrival_index,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_sequences=source.params.num_sequences,
        )
