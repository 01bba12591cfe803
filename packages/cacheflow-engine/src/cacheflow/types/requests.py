"""What the two sides of the engine say to each other of a request: token ids and numbers, no text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cacheflow.errors import CacheflowError, InvalidRequestError, RequestFailedError
from cacheflow.types.outputs import Logprobs
from cacheflow.types.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class ResumedSequence:
    """What a client has received of one sequence from an engine that died.

    Attributes:
        index: The sequence's number within its request.
        token_ids: Its output so far, at least one token.
        cumulative_logprob: Sum of the raw log probabilities of `token_ids`, in nats.
        is_finished: Whether it has ended, or was aborted.
    """

    index: int
    token_ids: list[int]
    cumulative_logprob: float
    is_finished: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What a client hands to the engine: token ids and numbers, no text.

    Attributes:
        request_id: Unique among the client's unfinished requests.
        client_id: Who asks: the `fair` policy shares between clients.
        prompt_token_ids: At least one.
        params: With `seed` set: the client draws one where the user gave none.
        arrival_s: When it arrived, seconds since the epoch; kept when the request is sent again.
        priority: Smaller is sooner, under the `priority` policy.
        cache_salt: Requests share cached blocks only under equal salts.
        resumed: Empty, or one entry for each of the request's sequences: the engine goes on behind their tokens. Everything
            that depends on the output (limits, penalties, random numbers) goes on too. Beam search starts again instead.
        task: "embed" gives one vector for the prompt and no token; most of `params` then means nothing.
        pooling: What "embed" gives: the mean of the model's last hidden states over the prompt, or that of its last token.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    client_id: str = ""
    priority: int = 0
    cache_salt: str = ""
    resumed: list[ResumedSequence] = field(default_factory=list)
    task: Literal["generate", "embed"] = "generate"
    pooling: Literal["mean", "last"] = "mean"


@dataclass(frozen=True, kw_only=True)
class SequenceUpdate:
    """What one step added to one sequence.

    Attributes:
        index: The sequence's number within its request, from 0.
        new_token_ids: The tokens added since the last update.
        new_logprobs: One entry per new token, or None when not asked for.
        cumulative_logprob: Sum of raw log probabilities of all its tokens, in nats.
        finish_reason: None while it runs.
        stop_reason: The id of `stop_token_ids` that ended it, or None.
    """

    index: int
    new_token_ids: list[int]
    cumulative_logprob: float
    new_logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass(kw_only=True)
class RequestUpdate:
    """What one step added to one request. Beam search sends a single one, when it ends: its sequences, best first.

    The scheduler fills it while it applies a step; once handed out it does not change.

    Attributes:
        request_id: The request.
        client_id: Whose it is.
        sequences: Those that changed.
        finished: Whether the request has left the engine.
        new_prompt_logprobs: Entries for the prompt tokens scored in this step (the first token's is None), or None.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        embedding: The last and only update of a request whose task is "embed" has it: the pooled hidden states as they are.
        error: Why it failed, or None.
        is_invalid: The error is the request's own fault (an HTTP frontend answers 400), not the engine's.
        param: The field at fault, or None.
    """

    request_id: str
    sequences: list[SequenceUpdate]
    finished: bool
    new_prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    client_id: str = ""
    embedding: list[float] | None = None
    error: str | None = None
    is_invalid: bool = False
    param: str | None = None

    def exception(self) -> CacheflowError | None:
        """The error that the request's caller gets, if it failed."""
        if self.error is None:
            return None
        return InvalidRequestError(self.error, param=self.param) if self.is_invalid else RequestFailedError(self.error)
