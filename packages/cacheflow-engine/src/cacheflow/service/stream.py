"""A request on its way: what has arrived of it, so that another engine can go on where one died. It knows no socket."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from cacheflow.errors import CacheflowError
from cacheflow.types import EngineRequest, RequestUpdate, ResumedSequence


@dataclass
class Stream:
    """A request and what its caller waits for.

    It remembers what was received, so that another engine can go on where this one died.

    Attributes:
        request: As it was sent first.
        updates: What has arrived; an exception ends the stream.
        is_sent: Some engine was sent it, and may have accepted it.
        is_left: The caller has gone; the engine has yet to say its last word on the request.
        ended: Set with the last word, after which the request's id is free again.
    """

    request: EngineRequest
    updates: asyncio.Queue[RequestUpdate | CacheflowError] = field(default_factory=asyncio.Queue)
    is_sent: bool = False
    is_left: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _received: dict[int, ResumedSequence] = field(default_factory=dict)
    _num_prompt_logprobs: int = 0
    _num_repeated: int = 0

    def note(self, update: RequestUpdate) -> None:
        """Remembers an update that is about to be given out, and takes out of it what was given out before."""
        for sequence in update.sequences:
            known = self._received.get(sequence.index)
            token_ids = known.token_ids if known else []
            token_ids.extend(sequence.new_token_ids)
            has_ended = sequence.finish_reason is not None or (known is not None and known.is_finished)
            self._received[sequence.index] = ResumedSequence(
                index=sequence.index,
                token_ids=token_ids,
                cumulative_logprob=sequence.cumulative_logprob,
                is_finished=has_ended,
            )
        if update.new_prompt_logprobs:
            num_repeated = min(self._num_repeated, len(update.new_prompt_logprobs))
            self._num_repeated -= num_repeated
            update.new_prompt_logprobs = update.new_prompt_logprobs[num_repeated:]
            self._num_prompt_logprobs += len(update.new_prompt_logprobs)

    def note_abort(self, index: int) -> None:
        """One sequence was aborted: no other engine is to go on with it."""
        if index in self._received:
            self._received[index] = replace(self._received[index], is_finished=True)

    def again(self) -> EngineRequest:
        """The request as another engine is to take it over."""
        if not self._received:
            self._num_repeated = self._num_prompt_logprobs
        return replace(self.request, resumed=[self._received[index] for index in sorted(self._received)])
