"""What a user gets back."""

from __future__ import annotations

from dataclasses import dataclass

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"
FINISH_ERROR = "error"

Logprobs = dict[int, float]
"""Token id to raw log probability (nats) at one position: the chosen token first, then the most likely ones, best first."""


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One generated sequence of a request.

    Attributes:
        index: Its rank among the request's outputs, from 0.
        text: The generated text, without the prompt.
        token_ids: The generated token ids, the token that ended it included.
        cumulative_logprob: Sum of the raw log probabilities of `token_ids`, in nats.
        logprobs: One entry per token id, or None when not asked for.
        finish_reason: None while it runs; "stop" (end of text, stop string or stop token), "length", "abort" or "error".
        stop_reason: The stop string, or the id of `stop_token_ids`, that ended it; None for an end-of-text token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request with all that has been generated for it so far.

    Attributes:
        request_id: The id that the request was added under.
        prompt: Its text; None when it was given as token ids.
        prompt_token_ids: The tokens the model saw.
        outputs: The sequences. With beam search or `best_of` above `n` only the end shows which they are, and they come best
            first.
        finished: Whether this is the last output of the request.
        prompt_logprobs: One entry per prompt token, None for the first; None when not asked for.
        num_cached_tokens: Prompt tokens that were found in the prefix cache.
        num_generated_tokens: Tokens of all sequences, those that `best_of` leaves out among them.
        error: Why the request failed, or None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingOutput:
    """A prompt as a vector.

    Attributes:
        request_id: The id that the request was added under.
        prompt: Its text; None when it was given as token ids.
        prompt_token_ids: The tokens the model saw.
        embedding: As many numbers as the model's hidden size.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    embedding: list[float]
