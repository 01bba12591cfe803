"""The group `cacheflow.schedulers`: the policy that chooses whose turn it is, and what it sees of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestView:
    """What a policy sees of a request.

    Attributes:
        request_id: The client's name for it.
        client_id: Who asked.
        priority: Smaller is sooner.
        arrival_s: Seconds since the epoch.
        arrival_index: Counts the engine's requests; unique, later is larger.
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Generated so far, over all sequences.
        num_sequences: Sequences it runs.
    """

    request_id: str
    client_id: str
    priority: int
    arrival_s: float
    arrival_index: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_sequences: int


class SchedulingPolicy(Protocol):
    """Chooses; admission, blocks and budget stay in the scheduler, so a policy can't corrupt them."""

    CONTRACT_VERSION: ClassVar[int]

    def key(self, view: RequestView) -> Any:
        """Computed once, on arrival: requests are served in ascending order. Keys must be comparable with one another."""
        ...

    def victim_key(self, view: RequestView) -> Any:
        """Of the running requests that could lose their blocks, the one with the largest does."""
        ...

    def chunk(self, view: RequestView, budget: int) -> int:
        """How many prompt tokens the request may compute in this step: 1 to `budget`."""
        ...
