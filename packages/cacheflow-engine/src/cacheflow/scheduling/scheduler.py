"""Decides each step, and applies what it gave: continuous batching over a paged KV cache.

Iteration-level scheduling (Orca, OSDI '22) under a token budget, with prompt chunks beside decodes (Sarathi-Serve,
arXiv:2403.02310). It owns all requests, their sequences and, through the `KVManager`, their block tables. It knows token ids
only: no text, no tensors.

A step is `{sequence: num_tokens}`. A decode is a sequence with one uncomputed token; a prompt, or a sequence that lost its
blocks, is one with more. Nothing else tells them apart.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import replace

from cacheflow.errors import InvalidRequestError
from cacheflow.interfaces import UNKNOWN_TOKEN, Sample, SampleSpec, ScheduledSequence, SchedulingPolicy, Step, StepOutput
from cacheflow.kvcache.manager import KVManager
from cacheflow.scheduling.beam_search import BeamSearch
from cacheflow.scheduling.sequence import Request, Sequence
from cacheflow.types import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    MAX_VIEWED_REQUESTS,
    EngineRequest,
    EngineStats,
    EngineView,
    Logprobs,
    RequestUpdate,
    SequenceUpdate,
)

GOOD_STEPS = 64
"""After so many steps in a row that found enough memory, a budget that was lowered doubles: at most one in so many fails. Each
time that doubling was wrong, it takes twice as many: a long prompt that starts again gets through in between."""
WATERMARK = 0.01
"""Share of all blocks that admission leaves free, so that running sequences can grow before the first preemption."""


class Scheduler:
    """All requests between arrival and end.

    Args:
        policy: Chooses the order.
        kv: The block tables.
        max_num_batched_tokens: Token budget of a step.
        max_num_seqs: Most sequences that hold blocks at a time; at most the budget, so that every decode fits into a step.
        max_model_len: Most tokens of a sequence.
        eos_token_ids: Those that end a sequence unless its request ignores them.
        enable_prefix_caching: Whether requests find each other's blocks.
        prompt_chunk_size: Most prompt tokens of a step in which sequences decode; None: all that the budget leaves.

    Attributes:
        kv: The block tables.
        num_waiting_tokens: Known tokens of the requests that wait.
        num_admitted_tokens: Those of the requests that no longer do, since the start.
        num_unfinished_sequences: Sequences that run, or will when their request does.
    """

    def __init__(
        self,
        policy: SchedulingPolicy,
        kv: KVManager,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        enable_prefix_caching: bool = True,
        prompt_chunk_size: int | None = None,
    ) -> None:
        assert max_num_seqs <= max_num_batched_tokens
        self.kv = kv
        self._policy = policy
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._enable_prefix_caching = enable_prefix_caching
        self._prompt_chunk_size = prompt_chunk_size or max_num_batched_tokens
        self._requests: dict[tuple[str, str], Request] = {}
        self._running: list[Request] = []
        self._waiting: list[Request] = []
        self._num_dead = 0  # of the waiting: they are taken out when they come up, or are the majority
        self._scheduled: dict[int, tuple[Request, Sequence]] = {}  # in the step that was made and not ended; those alive
        self._following: dict[int, tuple[Request, Sequence]] = {}  # likewise in the step that follows it
        self._finished_indices: list[int] = []
        self._blocked: Request | None = None
        self._num_available_when_blocked = 0
        self.num_waiting_tokens = 0
        self.num_admitted_tokens = 0
        self.num_unfinished_sequences = 0
        self._token_limit = max_num_batched_tokens
        self._num_good_steps = 0
        self._num_steps_to_grow = GOOD_STEPS
        self._has_grown = False  # and no step has found too little memory since
        self._num_seats_taken = 0  # by what runs, of max_num_seqs
        self._num_arrivals = 0
        self._num_sequences = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_cached_tokens = 0
        self._num_steps = 0

    # Requests come and go.

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is left."""
        return bool(self._requests)

    def is_alive(self, request: Request) -> bool:
        """Whether it has not ended."""
        return self._requests.get((request.source.client_id, request.source.request_id)) is request

    def scheduled(self) -> Iterator[EngineRequest]:
        """The requests of the step that was made and not yet ended; one with several sequences may come several times."""
        return (request.source for request, _ in self._scheduled.values())

    def add(self, source: EngineRequest) -> Request:
        """Accepts a request, or refuses at once what can never be served.

        Raises:
            InvalidRequestError: With the numbers and what to change.
        """
        params, num_prompt_tokens = source.params, len(source.prompt_token_ids)
        if (source.client_id, source.request_id) in self._requests:
            raise InvalidRequestError(f"The request id {source.request_id!r} is in use.", param="request_id")
        if num_prompt_tokens == 0:
            raise InvalidRequestError("The prompt is empty: at least one token is needed.", param="prompt")
        is_embedding = source.task == "embed"
        most_prompt_tokens = self._max_model_len - (0 if is_embedding else 1)  # At least one is to be generated.
        if num_prompt_tokens > most_prompt_tokens:
            raise InvalidRequestError(
                f"The prompt has {num_prompt_tokens} tokens; at most {most_prompt_tokens} fit the context of "
                f"{self._max_model_len} tokens (--max-model-len).",
                param="prompt",
            )
        if params.num_sequences > self._max_num_seqs:
            raise InvalidRequestError(
                f"{params.sequences_field} asks for {params.num_sequences} sequences at a time; this engine runs at most "
                f"{self._max_num_seqs} (--max-num-seqs).",
                param=params.sequences_field,
            )
        if is_embedding and (params.num_sequences > 1 or params.prompt_logprobs is not None or source.resumed):
            raise InvalidRequestError(
                'The task "embed" gives one vector: n, best_of, prompt_logprobs and resumed mean nothing there. Drop them.',
                param="task",
            )
        room = 1 if is_embedding else self._max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        num_blocks = self._most_blocks(num_prompt_tokens, max_tokens, params.num_sequences)
        if num_blocks > self.kv.pool.num_blocks:
            raise InvalidRequestError(
                f"The request may need {num_blocks} KV blocks of {self.kv.block_size} tokens ({num_prompt_tokens} prompt "
                f"and {params.num_sequences} × {max_tokens} output tokens), and the KV cache has {self.kv.pool.num_blocks}. "
                "Lower max_tokens or n, or give the engine more memory (--kv-cache-memory).",
                param="max_tokens",
            )
        stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        request = Request(
            source=source,
            arrival_index=self._num_arrivals,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            sequences=_resumed_sequences(source, self._num_sequences, max_tokens)
            or [Sequence(id=self._num_sequences, index=0, token_ids=list(source.prompt_token_ids))],
        )
        if source.resumed:
            request.has_forked = True
            request.num_scored_tokens = num_prompt_tokens
            request.num_output_tokens = sum(len(sequence.token_ids) for sequence in source.resumed)
        if params.use_beam_search:
            request.beam = BeamSearch(
                width=params.num_sequences,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
            )
        self._num_arrivals += 1
        self._num_sequences += params.num_sequences
        self._num_prompt_tokens += num_prompt_tokens
        request.key = self._policy.key(request.view)
        self._requests[source.client_id, source.request_id] = request
        self.num_unfinished_sequences += params.num_sequences
        self.num_waiting_tokens += request.num_known_tokens
        heapq.heappush(self._waiting, request)
        return request

    def abort(self, request_id: str, client_id: str = "", index: int | None = None) -> None:
        """Ends a request, or one sequence of it, without a further update. An unknown one has ended already."""
        request = self._requests.get((client_id, request_id))
        if request is None:
            return
        if index is not None and request.beam is None and request.has_forked:
            for sequence in [s for s in request.sequences if s.index == index]:
                self._end_sequence(request, sequence)
            if request.sequences:
                return
        self._end_request(request)

    def fail(self, request: Request, error: str, *, is_invalid: bool, param: str | None = None) -> RequestUpdate:
        """Ends a request with an error."""
        if self.is_alive(request):
            self._end_request(request)
        return RequestUpdate(
            request_id=request.source.request_id,
            client_id=request.source.client_id,
            sequences=[
                SequenceUpdate(
                    index=s.index, new_token_ids=[], cumulative_logprob=s.cumulative_logprob, finish_reason=FINISH_ERROR
                )
                for s in request.sequences
            ],
            finished=True,
            error=error,
            is_invalid=is_invalid,
            param=param,
        )

    def stats(self) -> EngineStats:
        """A reading between two steps."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._requests) - len(self._running),
            num_blocks=self.kv.pool.num_blocks,
            num_free_blocks=self.kv.pool.num_free,
            num_cached_blocks=self.kv.pool.num_idle,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_steps=self._num_steps,
        )

    def view(self) -> EngineView:
        """Who holds which block, between two steps. Its cost grows with the blocks and the waiting requests."""
        requests = self._running[:MAX_VIEWED_REQUESTS]
        waiting = (r for r in self._waiting if self.is_alive(r))
        requests += heapq.nsmallest(MAX_VIEWED_REQUESTS - len(requests), waiting)
        owners = {sequence.id: number for number, request in enumerate(requests) for sequence in request.sequences}
        return EngineView(stats=self.stats(), requests=[r.summary for r in requests], blocks=self.kv.block_map(owners))

    def check(self) -> None:
        """Asserts that every count kept along the way is what counting anew gives, and the invariants of the KV cache."""
        self.kv.check()
        assert sorted(self._running) == self._running, "the running requests are out of order"
        assert all(self.is_alive(r) and r.is_running for r in self._running), "a request that has ended runs"
        waiting = [r for r in self._waiting if self.is_alive(r)]
        assert not any(r.is_running for r in waiting), "a running request waits"
        assert len(waiting) + len(self._running) == len(self._requests), "a request neither waits nor runs, or does both"
        assert self._num_dead == len(self._waiting) - len(waiting)
        assert self.num_waiting_tokens == sum(r.num_prompt_tokens + r.num_output_tokens for r in waiting)
        assert self.num_unfinished_sequences == sum(r.source.params.num_sequences for r in self._requests.values())
        assert self._num_seats_taken == sum(r.source.params.num_sequences for r in self._running)
        held = {sequence.id for request in self._running for sequence in request.sequences}
        assert self.kv.tables.keys() <= held, "a sequence that does not run holds blocks"

    # A step is made.

    def schedule(self, only: Collection[Request] | None = None) -> Step | None:
        """The next step, or None when there is nothing to do. It must be ended by `apply` or `rollback`.

        Args:
            only: Just these requests, while one that makes steps fail is being looked for.
        """
        assert not self._scheduled
        if only is not None:
            for request in [r for r in self._running if r not in only]:
                self._preempt(request)
        budget = self._token_limit
        plan: list[ScheduledSequence] = []
        num_preemptions = self._num_preemptions
        # Decodes first: a prompt chunk never holds up a stream. Then prompts that have begun, then those that wait.
        decoding: list[Request] = []
        computing: list[Request] = []
        for request in self._running:
            (decoding if self._is_decoding(request) else computing).append(request)
        for request in decoding:
            if not request.is_running:
                continue
            if budget and self._schedule_one_decode(request, plan):
                budget -= 1
            else:
                budget = max(0, budget - self._schedule_request(request, budget, plan))
        if plan:
            budget = min(budget, self._prompt_chunk_size)
        for request in computing:
            if request.is_running:
                budget = max(0, budget - self._schedule_request(request, budget, plan))
        if self._num_preemptions == num_preemptions:
            for request in self._admit(budget, only):
                budget = max(0, budget - self._schedule_request(request, budget, plan))
                if budget == 0 or self._num_preemptions != num_preemptions:
                    break
        if not plan:
            return None
        finished, self._finished_indices = tuple(self._finished_indices), []
        return Step(sequences=tuple(plan), copies=self.kv.take_copies(), finished_requests=finished)

    def schedule_following(self, step: Step) -> Step | None:
        """The step behind one that is running, made without knowing what that one chooses; None when that can't be.

        It can when every running sequence is about to have a token of its own chosen, nobody waits who could be let in, and
        there are blocks for one token more of each. A sequence that turns out to have ended is passed over when the step is
        applied: what it wrote went to a block of its own, which nobody finds, and nobody reads before it is written again.
        `apply` or `rollback` of the running step comes next.
        """
        assert not self._following
        if len(self._scheduled) != len(self._running) or self._may_admit():
            return None
        plan: list[ScheduledSequence] = []
        following: dict[int, tuple[Request, Sequence]] = {}
        for entry in step.sequences:
            owner = self._scheduled.get(entry.sequence_id)
            if owner is None:
                continue
            request, sequence = owner
            is_single = len(request.sequences) == 1 and (request.has_forked or request.source.params.num_sequences == 1)
            if not (is_single and len(entry.samples) == 1 and request.beam is None):
                return None
            if len(sequence.output_token_ids) + 1 >= request.max_tokens:
                continue  # The running step gives it its last.
            start = entry.num_computed_tokens + len(entry.token_ids)
            if not self.kv.reserve(sequence.id, start, start + 1):
                return None
            if not sequence.following_specs:
                sequence.following_specs = (replace(entry.samples[0], num_unknown=1),)
            following[sequence.id] = owner
            plan.append(
                ScheduledSequence(
                    sequence_id=sequence.id,
                    token_ids=(UNKNOWN_TOKEN,),
                    num_computed_tokens=start,
                    block_table=tuple(self.kv.tables[sequence.id].blocks),
                    samples=sequence.following_specs,
                )
            )
        if not plan:
            return None
        self._following = following
        finished, self._finished_indices = tuple(self._finished_indices), []
        return Step(sequences=tuple(plan), copies=self.kv.take_copies(), finished_requests=finished, follows=True)

    def _may_admit(self) -> bool:
        """Whether the next `schedule` may let somebody in."""
        if not self._waiting:
            return False
        request = self._waiting[0]
        is_blocked = request is self._blocked and self.kv.pool.num_available <= self._num_available_when_blocked
        return not self.is_alive(request) or (self._has_seats(request) and not is_blocked)

    def _schedule_one_decode(self, request: Request, plan: list[ScheduledSequence]) -> bool:
        """The short way for nearly all requests of a step: a single sequence whose turn changes nothing but its last block."""
        sequence, start = request.sequences[0], request.sequences[0].num_computed_tokens
        is_usual = len(request.sequences) == 1 and request.beam is None and request.source.params.prompt_logprobs is None
        if not (is_usual and sequence.specs and self.kv.reserve(sequence.id, start, start + 1)):
            return False
        if (start + 1) % self.kv.block_size == 0:
            self.kv.publish(sequence.id, sequence.token_ids, start + 1)
        self._scheduled[sequence.id] = (request, sequence)
        plan.append(
            ScheduledSequence(
                sequence_id=sequence.id,
                token_ids=sequence.token_ids[start:],
                num_computed_tokens=start,
                block_table=tuple(self.kv.tables[sequence.id].blocks),
                samples=sequence.specs,
            )
        )
        return True

    def _schedule_request(self, request: Request, budget: int, plan: list[ScheduledSequence]) -> int:
        """Gives a running request its tokens of this step; returns how many. It may be preempted instead."""
        if budget == 0:
            return 0
        if not plan:
            budget = max(budget, request.source.params.num_sequences)  # Beams go in step, however small steps have become.
        is_decoding = self._is_decoding(request)
        if not is_decoding:
            budget = min(budget, max(1, self._policy.chunk(request.view, budget)))
        # Beams go in step: none computes its last token before all can.
        num_beams = len(request.sequences) if request.beam else 0
        hold_back = num_beams > 1 and (not is_decoding or num_beams > budget)
        num_scheduled = 0
        chosen: list[tuple[Sequence, int]] = []
        for sequence in request.sequences:
            if sequence.id not in self.kv.tables:
                self._open_table(request, sequence)
            num_tokens = min(sequence.num_remaining_tokens - hold_back, budget - num_scheduled)
            if num_tokens <= 0:
                continue
            while not self.kv.reserve(sequence.id, sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens):
                if not self._preempt_for(request):
                    return 0
            chosen.append((sequence, num_tokens))
            num_scheduled += num_tokens
            if sequence.num_remaining_tokens > 1:
                break  # it is being computed again: the next ones will find its blocks when they open their tables
        for sequence, num_tokens in chosen:
            end = sequence.num_computed_tokens + num_tokens
            self.kv.publish(sequence.id, sequence.token_ids, end)
            self._scheduled[sequence.id] = (request, sequence)
            plan.append(self._scheduled_sequence(request, sequence, end))
        return num_scheduled

    def _scheduled_sequence(self, request: Request, sequence: Sequence, end: int) -> ScheduledSequence:
        start, source = sequence.num_computed_tokens, request.source
        scored: list[int] = []
        if request.wants_prompt_scores:
            scored = source.prompt_token_ids[start + 1 : end + 1]
        return ScheduledSequence(
            sequence_id=sequence.id,
            token_ids=sequence.token_ids[start:end],
            num_computed_tokens=start,
            block_table=tuple(self.kv.tables[sequence.id].blocks),
            samples=self._sample_specs(request, sequence) if end == len(sequence.token_ids) else (),
            num_prompt_logprobs=source.params.prompt_logprobs if scored else None,
            scored_token_ids=scored,
            pooling=source.pooling if request.is_embedding else None,
        )

    def _sample_specs(self, request: Request, sequence: Sequence) -> tuple[SampleSpec, ...]:
        if request.is_embedding:
            return ()
        if request.has_forked and sequence.specs:
            return sequence.specs
        # Behind the prompt, all sequences of a request choose their first token from one row of logits.
        is_fork = request.beam is None and not request.has_forked
        params = request.source.params
        specs = tuple(
            SampleSpec(
                sequence_id=sequence.id + offset,
                request_index=request.arrival_index,
                index=sequence.index + offset,
                params=params,
                prompt_token_ids=request.source.prompt_token_ids,
                output_token_ids=sequence.output_token_ids,
                num_candidates=request.beam.num_candidates if request.beam else 0,
            )
            for offset in range(params.num_sequences if is_fork else 1)
        )
        if request.has_forked:
            sequence.specs = specs
        return specs

    def _is_decoding(self, request: Request) -> bool:
        if not request.has_forked:
            return False
        if len(request.sequences) == 1:  # Nearly all: a generator would take as long as the rest of it.
            return request.sequences[0].num_remaining_tokens == 1
        return all(s.num_remaining_tokens == 1 for s in request.sequences)

    def _admit(self, budget: int, only: Collection[Request] | None) -> Iterator[Request]:
        """Gives waiting requests blocks for all their known tokens, in the policy's order, until one does not fit."""
        if only is not None:
            for request in sorted(r for r in only if self.is_alive(r) and not r.is_running):
                if not self._has_seats(request) or not self._open(request):
                    return
                self._waiting.remove(request)
                heapq.heapify(self._waiting)
                yield request
            return
        while self._waiting and budget > 0:
            request = self._waiting[0]
            if self.is_alive(request):
                # Looking a long prompt up anew in every step would be dear: first more blocks must have become available.
                if not self._has_seats(request):
                    return
                if request is self._blocked and self.kv.pool.num_available <= self._num_available_when_blocked:
                    return
                if not self._open(request):
                    self._blocked, self._num_available_when_blocked = request, self.kv.pool.num_available
                    return
                self._blocked = None
            heapq.heappop(self._waiting)
            if request.is_running:
                yield request
            else:
                self._num_dead -= 1

    def _has_seats(self, request: Request) -> bool:
        return self._num_seats_taken + request.source.params.num_sequences <= self._max_num_seqs

    def _open(self, request: Request) -> bool:
        """Tries to make a request running, with blocks for all the tokens that its first sequence has."""
        watermark = int(WATERMARK * self.kv.pool.num_blocks) if self._running else 0
        first = request.sequences[0]
        self._open_table(request, first)
        num_new_blocks = self.kv.num_new_blocks(first.id, first.num_computed_tokens, len(first.token_ids))
        if num_new_blocks + watermark > self.kv.pool.num_available:
            self._close_table(first)
            return False
        self.kv.reserve(first.id, first.num_computed_tokens, len(first.token_ids))
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = request.sequences[0].num_computed_tokens
            self._num_cached_tokens += request.num_cached_tokens
        request.is_running = True
        self._num_seats_taken += request.source.params.num_sequences
        self.num_waiting_tokens -= request.num_known_tokens
        self.num_admitted_tokens += request.num_known_tokens
        insort(self._running, request)
        return True

    def _preempt_for(self, request: Request) -> bool:
        """Takes the blocks of the policy's victim among the requests not yet in this step; False if that is `request`."""
        scheduled = {id(owner) for owner, _ in self._scheduled.values()}
        candidates = [r for r in self._running if id(r) not in scheduled]
        victim = max(candidates, key=lambda r: (self._policy.victim_key(r.view), r.arrival_index))
        self._preempt(victim)
        return victim is not request

    def _preempt(self, request: Request) -> None:
        """Back to waiting; what it has generated stays, and is computed again later."""
        self._release(request)
        self._num_preemptions += 1
        self.num_waiting_tokens += request.num_known_tokens
        heapq.heappush(self._waiting, request)

    # A step ends.

    def apply(self, step: Step, output: StepOutput) -> list[RequestUpdate]:
        """The step succeeded: its tokens count. Returns what clients are to be told."""
        self.kv.commit()
        self._num_steps += 1
        if self._token_limit < self._max_num_batched_tokens:
            self._num_good_steps += 1
            if self._num_good_steps == self._num_steps_to_grow:
                self._num_good_steps = 0
                if self._has_grown:
                    self._num_steps_to_grow = GOOD_STEPS
                self._has_grown = True
                self._token_limit = min(2 * self._token_limit, self._max_num_batched_tokens)
        updates: dict[int, RequestUpdate] = {}
        beams: dict[int, tuple[Request, list[Sample]]] = {}
        for place, (entry, samples, scores) in enumerate(
            zip(step.sequences, output.samples, output.prompt_logprobs, strict=True)
        ):
            owner = self._scheduled.pop(entry.sequence_id, None)
            if owner is None:
                continue  # It ended while this step, which follows another, was on its way.
            request, sequence = owner
            sequence.num_computed_tokens += len(entry.token_ids)
            if request.wants_prompt_scores:
                self._add_prompt_logprobs(request, entry, scores or [], updates)
            if request.is_embedding:
                self._add_pooled(request, entry, output.pooled[place], updates)
            if not samples:
                continue
            if request.beam:
                beams.setdefault(request.arrival_index, (request, []))[1].append(samples[0])
                continue
            if not request.has_forked:
                self._fork(request, sequence)
                for fork, sample in zip(list(request.sequences), samples, strict=True):
                    self._append(request, fork, sample, updates)
            else:
                self._append(request, sequence, samples[0], updates)
        for request, candidates in beams.values():
            self._advance_beams(request, candidates, updates)
        self._scheduled, self._following = self._following, {}
        for _, sequence in self._scheduled.values():
            # Only now it is known what will be in a block that the step on its way fills.
            if (sequence.num_computed_tokens + 1) % self.kv.block_size == 0:
                self.kv.publish(sequence.id, sequence.token_ids, sequence.num_computed_tokens + 1)
        return list(updates.values())

    def rollback(self) -> list[Request]:
        """The step failed: nothing of it counts, and its requests wait again. Returns them, in order."""
        requests = {request.arrival_index: request for request, _ in self._scheduled.values()}
        self._scheduled.clear()
        self._following.clear()
        incomplete = set(self.kv.rollback())
        for request in list(self._running):
            if request.arrival_index in requests or any(s.id in incomplete for s in request.sequences):
                self._preempt(request)
        return list(requests.values())

    def make_smaller_steps(self, num_tokens: int, requests: list[Request]) -> bool:
        """A step of so many tokens of these requests found too little memory. False if it can't be made smaller."""
        if len(requests) == 1 and num_tokens <= requests[0].source.params.num_sequences:
            return False
        self._token_limit = max(1, num_tokens // 2)
        self._num_good_steps = 0
        if self._has_grown:
            self._num_steps_to_grow *= 2
        self._has_grown = False
        return True

    def reset(self) -> None:
        """Forgets all blocks, in whatever state an interrupt left them: every request waits, and is computed anew."""
        self.kv = KVManager(self.kv.pool.num_blocks, self.kv.block_size)
        self._scheduled.clear()
        self._following.clear()
        self._running.clear()
        self._num_seats_taken = 0
        for request in self._requests.values():
            request.is_running = False
            for sequence in request.sequences:
                sequence.num_computed_tokens = 0
        self._waiting = sorted(self._requests.values())
        self.num_waiting_tokens = sum(r.num_known_tokens for r in self._waiting)
        self._num_dead = 0

    def _append(self, request: Request, sequence: Sequence, sample: Sample, updates: dict[int, RequestUpdate]) -> None:
        token_id = sample.token_ids[0]
        sequence.append(token_id, sample.logprobs[0])
        request.num_output_tokens += 1
        self._num_generated_tokens += 1
        finish_reason: str | None = None
        num_tokens = len(sequence.output_token_ids)
        if token_id in request.stop_token_ids and num_tokens > request.source.params.min_tokens:
            finish_reason = FINISH_STOP
        elif num_tokens >= request.max_tokens:
            finish_reason = FINISH_LENGTH
        self._update(request, updates).sequences.append(
            SequenceUpdate(
                index=sequence.index,
                new_token_ids=[token_id],
                new_logprobs=sample.top_logprobs,
                cumulative_logprob=sequence.cumulative_logprob,
                finish_reason=finish_reason,
                stop_reason=_stop_reason(request, token_id) if finish_reason == FINISH_STOP else None,
            )
        )
        if finish_reason:
            self._end_sequence(request, sequence)
            if not request.sequences:
                self._finish(request, updates)

    def _fork(self, request: Request, first: Sequence) -> None:
        """The prompt is computed: one sequence becomes `params.num_sequences`, which share all its blocks."""
        request.has_forked = True
        for index in range(1, request.source.params.num_sequences):
            fork = first.fork(first.id + index, index)
            self.kv.fork(first.id, fork.id)
            request.sequences.append(fork)

    def _advance_beams(self, request: Request, samples: list[Sample], updates: dict[int, RequestUpdate]) -> None:
        """Replaces the live beams by their best continuations: forks those, frees the others."""
        assert request.beam is not None
        request.has_forked = True
        parents = request.sequences
        continuations = request.beam.advance(parents, samples)
        self._num_generated_tokens += len(continuations)
        request.num_output_tokens += len(continuations)
        children: list[Sequence] = []
        for index, continuation in enumerate(continuations):
            parent = parents[continuation.parent]
            child = parent.fork(self._num_sequences, index)
            self._num_sequences += 1
            self.kv.fork(parent.id, child.id)
            child.append(continuation.token_id, continuation.logprob)
            child.score = continuation.score
            if continuation.top_logprobs is not None:
                child.logprobs.append(continuation.top_logprobs)
            children.append(child)
        for parent in parents:
            self.kv.close(parent.id)
        request.sequences = children
        if request.beam.is_done:
            update = self._update(request, updates)
            for index, beam in enumerate(request.beam.finished):
                update.sequences.append(
                    SequenceUpdate(
                        index=index,
                        new_token_ids=beam.token_ids,
                        new_logprobs=beam.logprobs or None,
                        cumulative_logprob=beam.cumulative_logprob,
                        finish_reason=FINISH_STOP if beam.is_stopped else FINISH_LENGTH,
                        stop_reason=_stop_reason(request, beam.token_ids[-1]) if beam.is_stopped else None,
                    )
                )
            self._finish(request, updates)

    def _add_prompt_logprobs(
        self, request: Request, entry: ScheduledSequence, scores: list[Logprobs], updates: dict[int, RequestUpdate]
    ) -> None:
        first: list[Logprobs | None] = [] if request.num_scored_tokens else [None]
        request.num_scored_tokens += len(first)
        # scores[i] belongs to position num_computed_tokens + 1 + i. After a preemption some come a second time.
        fresh = scores[max(0, request.num_scored_tokens - entry.num_computed_tokens - 1) :]
        request.num_scored_tokens += len(fresh)
        update = self._update(request, updates)
        update.new_prompt_logprobs = [*first, *fresh]

    def _add_pooled(
        self, request: Request, entry: ScheduledSequence, pooled: list[float], updates: dict[int, RequestUpdate]
    ) -> None:
        # No cached block is read, so a prompt that lost its blocks comes again from its first token.
        if request.source.pooling == "mean" and entry.num_computed_tokens > 0:
            pooled = [old + new for old, new in zip(request.pooled, pooled, strict=True)]
        request.pooled = pooled
        if entry.num_computed_tokens + len(entry.token_ids) == request.num_prompt_tokens:
            count = request.num_prompt_tokens if request.source.pooling == "mean" else 1
            self._update(request, updates).embedding = [value / count for value in pooled]
            self._finish(request, updates)

    def _update(self, request: Request, updates: dict[int, RequestUpdate]) -> RequestUpdate:
        update = updates.get(request.arrival_index)
        if update is None:
            update = updates[request.arrival_index] = RequestUpdate(
                request_id=request.source.request_id,
                client_id=request.source.client_id,
                sequences=[],
                finished=False,
                num_cached_tokens=request.num_cached_tokens,
            )
        return update

    def _finish(self, request: Request, updates: dict[int, RequestUpdate]) -> None:
        self._update(request, updates).finished = True
        self._end_request(request)

    # What is given up.

    def _end_sequence(self, request: Request, sequence: Sequence) -> None:
        self._close_table(sequence)
        request.sequences.remove(sequence)

    def _end_request(self, request: Request) -> None:
        was_waiting = not request.is_running
        self._release(request)
        del self._requests[request.source.client_id, request.source.request_id]
        if request.num_cached_tokens >= 0:  # Otherwise it was never in a step, and no worker knows it.
            self._finished_indices.append(request.arrival_index)
        self.num_unfinished_sequences -= request.source.params.num_sequences
        if was_waiting:
            self.num_waiting_tokens -= request.num_known_tokens
            self._num_dead += 1
            if 2 * self._num_dead > len(self._waiting):
                self._waiting = sorted(r for r in self._waiting if self.is_alive(r))
                self._num_dead = 0

    def _release(self, request: Request) -> None:
        """A request stops running: its sequences lose their blocks."""
        if request.is_running:
            for sequence in request.sequences:
                self._close_table(sequence)
            request.is_running = False
            self._num_seats_taken -= request.source.params.num_sequences
            self._running.remove(request)

    def _open_table(self, request: Request, sequence: Sequence) -> None:
        # Without prefix caching a request still shares with itself: its own salt.
        salt = request.source.cache_salt if self._enable_prefix_caching else f"request {request.arrival_index}"
        reuse = not (request.wants_prompt_scores or request.is_embedding)
        sequence.num_computed_tokens = self.kv.open(sequence.id, sequence.token_ids, salt, reuse=reuse)

    def _close_table(self, sequence: Sequence) -> None:
        if sequence.id in self.kv.tables:
            self.kv.close(sequence.id)
        sequence.num_computed_tokens = 0
        self._scheduled.pop(sequence.id, None)
        self._following.pop(sequence.id, None)

    def _most_blocks(self, num_prompt_tokens: int, max_tokens: int, num_sequences: int) -> int:
        """Blocks that a request may hold at the end: full prompt blocks are shared, the rest is each sequence's own.

        The last token generated is never stored.
        """
        num_shared = num_prompt_tokens // self.kv.block_size
        return num_shared + num_sequences * (self.kv.blocks_for(num_prompt_tokens + max_tokens - 1) - num_shared)


def _stop_reason(request: Request, token_id: int) -> int | None:
    """The id, if the request asked to stop at it; None for an end of text, which needs no naming."""
    return token_id if token_id in request.source.params.stop_token_ids else None


def _resumed_sequences(source: EngineRequest, first_id: int, max_tokens: int) -> list[Sequence]:
    """The sequences that were running when another engine died, with their outputs."""
    if not source.resumed:
        return []
    resumed = sorted(source.resumed, key=lambda r: r.index)
    is_whole = [r.index for r in resumed] == list(range(source.params.num_sequences))
    has_room = all(1 <= len(r.token_ids) < max_tokens for r in resumed if not r.is_finished)
    if source.params.use_beam_search or not is_whole or not has_room or all(r.is_finished for r in resumed):
        raise InvalidRequestError(
            f"resumed must have one entry for each of {source.params.num_sequences} sequences, no beams, at least one of them "
            f"unfinished with 1 to {max_tokens - 1} tokens.",
            param="resumed",
        )
    return [
        Sequence(
            id=first_id + r.index,
            index=r.index,
            token_ids=[*source.prompt_token_ids, *r.token_ids],
            output_token_ids=list(r.token_ids),
            cumulative_logprob=r.cumulative_logprob,
        )
        for r in resumed
        if not r.is_finished
    ]
