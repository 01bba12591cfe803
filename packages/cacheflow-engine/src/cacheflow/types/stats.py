"""Readings of the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A reading of the engine, taken between two steps.

    Attributes:
        num_running: Requests that hold blocks.
        num_waiting: Requests that wait for a first or a further turn.
        num_blocks: KV blocks in all.
        num_free_blocks: Blocks that hold nothing worth keeping.
        num_cached_blocks: Blocks that no request holds, kept for their content.
        num_preemptions: Requests that lost their blocks, since the start.
        num_prompt_tokens: Prompt tokens taken in, since the start.
        num_generated_tokens: Tokens generated, since the start.
        num_cached_tokens: Prompt tokens found in the prefix cache, since the start.
        num_steps: Steps run, since the start.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_steps: int


MAX_VIEWED_REQUESTS = 256
"""Most requests of an `EngineView`."""
BLOCK_FREE, BLOCK_CACHED, BLOCK_SHARED, BLOCK_OWNED = range(4)
"""The kinds of block in an `EngineView`."""


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """What an `EngineView` tells of a request.

    Attributes:
        request_id: The client's name for it.
        client_id: Whose it is.
        is_running: Whether it holds blocks.
        num_prompt_tokens: Tokens of the prompt.
        num_computed_tokens: Tokens of prompt and output that are in the cache, of the sequence with the most.
        num_output_tokens: Generated so far, over all sequences.
        num_sequences: Sequences that run, or will.
        arrival_s: Seconds since the epoch.
    """

    request_id: str
    client_id: str
    is_running: bool
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    num_sequences: int
    arrival_s: float


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """Who holds which block of the engine, taken between two steps.

    Attributes:
        stats: The counts of the same moment.
        requests: At most 256: running ones in their order, then the waiting ones that come up first.
        blocks: One number per KV block: 0 free, 1 cached (no request holds it), 2 shared by several requests or sequences (or
            held by one that `requests` has no place for), 3 + k held by `requests[k]` alone.
    """

    stats: EngineStats
    requests: list[RequestSummary]
    blocks: list[int]
