"""The group `cacheflow.executors`: what runs steps, and what a step and its result are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

from cacheflow.interfaces.models import ModelSpec
from cacheflow.types import Logprobs, ModelInfo, SamplingParams

if TYPE_CHECKING:
    from cacheflow.config import EngineConfig

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a started executor offers.

    Attributes:
        num_blocks: KV blocks.
        spec: The model's numbers.
        info: What clients need to know.
    """

    num_blocks: int
    spec: ModelSpec
    info: ModelInfo


UNKNOWN_TOKEN = -1
"""Stands for a token that the running step is about to choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSpec:
    """One choice to make from the logits behind a sequence's last scheduled token.

    Attributes:
        sequence_id: Unique in the engine's life.
        request_index: The request's `arrival_index`: processors are made once per request.
        index: The sequence's number within its request; the second coordinate of its random numbers.
        params: Of the request.
        prompt_token_ids: Of the request.
        output_token_ids: Generated so far.
        num_candidates: 0: choose one token. Otherwise return this many most likely ones (beam search).
        num_unknown: Tokens that precede this one and are not in `output_token_ids` yet: 1 in a step that follows another.
    """

    sequence_id: int
    request_index: int
    index: int
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    num_candidates: int = 0
    num_unknown: int = 0

    @property
    def position(self) -> int:
        """Tokens generated before this one: the third coordinate of its random number."""
        return len(self.output_token_ids) + self.num_unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledSequence:
    """One sequence's part of a step.

    Attributes:
        sequence_id: Unique in the engine's life.
        token_ids: The tokens to compute, at least one.
        num_computed_tokens: How many come before them in the cache.
        block_table: Blocks for all of them.
        samples: The choices to make behind the last token; empty within a prompt, several where sequences are about to fork.
        num_prompt_logprobs: How many top log probabilities to give beside each of `scored_token_ids`; None: no scores.
        scored_token_ids: The tokens that follow the scheduled ones in the prompt; the scored positions are the first
            `len(scored_token_ids)` scheduled ones.
        pooling: What is wanted of the scheduled tokens' last hidden states: their sum ("mean": the scheduler divides), the last
            one, or nothing.
    """

    sequence_id: int
    token_ids: Sequence[int]
    num_computed_tokens: int
    block_table: Sequence[int]
    samples: tuple[SampleSpec, ...] = ()
    num_prompt_logprobs: int | None = None
    scored_token_ids: Sequence[int] = ()
    pooling: Literal["mean", "last"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One pass of the model: `{sequence: tokens}`. There is no prefill mode.

    Attributes:
        sequences: In any order.
        copies: Blocks (source, destination) to copy before anything is written.
        finished_requests: `request_index` of requests that ended since the last step, whose processors can be dropped.
        follows: It was made while the step before ran, whose sequences include all of its own: they compute the one token that
            is chosen for them there. Here that token is `UNKNOWN_TOKEN`.
    """

    sequences: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()
    finished_requests: tuple[int, ...] = ()
    follows: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was chosen for one `SampleSpec`.

    Attributes:
        token_ids: One token; or the candidates, best first.
        scores: One per token: its log probability after processors (what beam search adds up); in nats.
        logprobs: One per token: its raw log probability, in nats.
        top_logprobs: One per token, when `params.logprobs` asks for it: that token first, then the most likely ones.
    """

    token_ids: list[int]
    scores: list[float]
    logprobs: list[float]
    top_logprobs: list[Logprobs] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What a step gave.

    Attributes:
        samples: One list per scheduled sequence, in the step's order, with one entry per `SampleSpec`.
        prompt_logprobs: Likewise: entries for `scored_token_ids`, or None.
        pooled: `hidden_size` numbers for each scheduled sequence with a `pooling`, by its place in the step.
        spans: Where the worker's time went, if that is recorded: name, start and duration in ns of the monotonic clock.
    """

    samples: list[list[Sample]]
    prompt_logprobs: list[list[Logprobs] | None]
    pooled: Mapping[int, list[float]] = field(default_factory=dict)
    spans: tuple[tuple[str, int, int], ...] = ()


class Pending(Protocol[T]):
    """A result on its way."""

    def result(self) -> T:
        """Waits for it; raises what the work raised."""
        ...


class Executor(Protocol):
    """Runs steps on one or several workers. Steps run in the order in which they are submitted.

    An executor may have `can_follow(step) -> bool`: whether it takes a step that `follows` the given one, which was submitted
    last, before that one's result is asked for. What the lists in a step hold counts when it is submitted: they grow later. No
    more than two steps are on their way. When the first one fails, the second one's result is asked for too, and means nothing.
    """

    CONTRACT_VERSION: ClassVar[int]

    @classmethod
    def supports(cls, config: EngineConfig) -> tuple[str, ...]:
        """Why this executor can't run `config`."""
        ...

    def start(self, config: EngineConfig) -> Capacity:
        """Loads the model and makes the KV cache.

        Raises:
            CacheflowError: It can't, with the reason.
        """
        ...

    def submit(self, step: Step) -> Pending[StepOutput]:
        """Starts a step. If it fails, nothing of it counts; after an `OutOfMemoryError` the next ones are smaller."""
        ...

    def check(self) -> None:
        """Raises `EngineDeadError` if a worker is gone."""
        ...

    def close(self) -> None:
        """Frees everything. May be called twice."""
        ...
