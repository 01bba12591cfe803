"""What waits in the engine: how much may, and how long it will take.

It knows counts, no requests. Asking it costs the same whether ten requests wait or ten thousand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cacheflow.config import EngineConfig
from cacheflow.errors import EngineOverloadedError
from cacheflow.types import EngineRequest

if TYPE_CHECKING:
    from cacheflow.core import EngineCore

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 60.0
"""The range of what a refused client is told."""
MAX_HELD_BYTES = 128 * 2**20
"""Of the messages that the engine's requests came in: 40 million token ids, a gigabyte or two in Python. Lists of token ids in
the parameters, and what is for plugins, are no tokens that wait, and count here alone."""
HALF_LIFE_S = 10.0
"""After so much time of computing, what was measured before counts half."""


class Backlog:
    """Refuses what would make the queue too long, and says when it is worth trying again.

    Args:
        core: Whose queue it is.
        config: With the limits.
    """

    def __init__(self, core: EngineCore, config: EngineConfig) -> None:
        self._scheduler = core.scheduler
        self._max_num_sequences = core.info.max_num_seqs + config.max_waiting_requests
        self._max_num_tokens = config.max_waiting_tokens
        self._busy_s = 0.0
        self._num_tokens = 0.0
        self._num_admitted_tokens = 0

    def check(self, request: EngineRequest, num_bytes: int = 0, num_held_bytes: int = 0) -> None:
        """Takes note of nothing; the request may be added if this returns. A request is always taken when there is no other.

        Args:
            request: It.
            num_bytes: Of the message that it came in.
            num_held_bytes: Of the messages of all requests that have not ended.

        Raises:
            EngineOverloadedError: Too much waits already, or what there is is too large.
        """
        if num_held_bytes and num_held_bytes + num_bytes > MAX_HELD_BYTES:
            raise EngineOverloadedError(
                f"The engine is full: its requests have {num_held_bytes} bytes, this one {num_bytes}, and at most "
                f"{MAX_HELD_BYTES} are taken. Try again in {self.retry_after_s:.0f} s.",
                self.retry_after_s,
            )
        num_waiting = self._scheduler.stats().num_waiting
        num_tokens = self._scheduler.num_waiting_tokens
        num_sequences = self._scheduler.num_unfinished_sequences + request.params.num_sequences
        is_full = num_sequences > self._max_num_sequences or num_tokens + len(request.prompt_token_ids) > self._max_num_tokens
        if num_waiting and is_full:
            retry_after_s = self.retry_after_s
            raise EngineOverloadedError(
                f"The engine is full: {num_waiting} requests with {num_tokens} tokens wait already. "
                f"Try again in {retry_after_s:.0f} s.",
                retry_after_s,
            )

    def note_step(self, duration_s: float) -> None:
        """A step was made in so much time."""
        decay = 0.5 ** (duration_s / HALF_LIFE_S)
        num_admitted_tokens = self._scheduler.num_admitted_tokens
        self._num_tokens = self._num_tokens * decay + (num_admitted_tokens - self._num_admitted_tokens)
        self._num_admitted_tokens = num_admitted_tokens
        self._busy_s = self._busy_s * decay + duration_s

    @property
    def retry_after_s(self) -> float:
        """Waiting tokens divided by the rate at which they leave the queue, from 1 to 60 s; 1 s before any was measured."""
        if not self._num_tokens:
            return MIN_RETRY_AFTER_S
        seconds = self._scheduler.num_waiting_tokens * self._busy_s / self._num_tokens
        return min(max(seconds, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
