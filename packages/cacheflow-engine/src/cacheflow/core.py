"""The engine's core: schedule → execute → apply. One owner drives it; it starts no thread and opens no socket.

Where the executor allows it, a step of decodes is made and submitted while the one before runs, so that a GPU never waits for
the host: its tokens go from one step to the next on the device. What such a step computed for a sequence that has turned out to
be over is dropped.

It knows requests as token ids and steps as values; text, processes and clients are others' business.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cacheflow.config import EngineConfig
from cacheflow.errors import CacheflowError, EngineDeadError, InvalidRequestError, OutOfMemoryError
from cacheflow.interfaces import Executor, Pending, Step, StepOutput
from cacheflow.kvcache.manager import KVManager
from cacheflow.plugins import load_plugin, select_plugin
from cacheflow.profile import EXECUTE, SpanMaker, StepProfile, no_span
from cacheflow.scheduling.scheduler import Scheduler
from cacheflow.scheduling.sequence import Request
from cacheflow.types import EngineRequest, EngineStats, EngineView, ModelInfo, RequestUpdate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Running:
    """A step that was submitted."""

    step: Step
    pending: Pending[StepOutput]


class EngineCore:
    """Takes requests, makes steps, tells what they gave.

    Args:
        config: The options.
        executor: Where steps run; None: the one that `config` names. It is started here and closed by `close`.

    Attributes:
        info: What clients need to know of the model.
        scheduler: Owner of all requests and block tables.
        span: Records what is done inside it as part of the steps' profile, if there is one.
        on_step: Called with the requests of each step before it runs: a record of what was running if it ends the process.

    Raises:
        CacheflowError: The model can't be loaded or the KV cache finds no room.
    """

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        if executor is None:
            _, executor_class = select_plugin("cacheflow.executors", config.executor, config)
            executor = executor_class()
        policy: Any = load_plugin("cacheflow.schedulers", config.scheduling_policy)
        self._executor: Executor = executor
        capacity = executor.start(config)
        self.info: ModelInfo = capacity.info
        self.scheduler = Scheduler(
            policy(),
            KVManager(capacity.num_blocks, config.block_size),
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=capacity.info.max_model_len,
            eos_token_ids=capacity.info.tokenizer.eos_token_ids,
            enable_prefix_caching=config.enable_prefix_caching,
            prompt_chunk_size=config.prompt_chunk_size,
        )
        self._max_n = config.max_n
        self._profile: StepProfile | None = None
        self.span: SpanMaker = no_span
        if config.profile or config.trace is not None:
            self._profile = StepProfile(config.trace, is_logged=config.profile)
            self.span = self._profile.span
        self.on_step: Callable[[Iterable[EngineRequest]], None] | None = None
        self._can_follow: Callable[[Step], bool] | None = getattr(executor, "can_follow", None)
        self._running: _Running | None = None
        self._suspects: list[list[Request]] = []
        self._alone: deque[Request] = deque()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    def add(self, request: EngineRequest, *, is_alone: bool = False) -> None:
        """Accepts a request.

        Args:
            request: It.
            is_alone: Until it has ended, steps hold nothing else: it is suspected of killing the process.

        Raises:
            InvalidRequestError: It can never be served; the message has the numbers.
        """
        if request.params.num_sequences > self._max_n:
            field = request.params.sequences_field
            raise InvalidRequestError(
                f"{field} asks for {request.params.num_sequences} sequences; this engine gives a request at most {self._max_n} "
                "(--max-n).",
                param=field,
            )
        self._check_token_ids(request)
        accepted = self.scheduler.add(request)
        if is_alone:
            self._alone.append(accepted)

    def abort(self, request_id: str, client_id: str = "", index: int | None = None) -> None:
        """Ends a request, or its sequence `index`; its blocks are free before the next step. No update follows."""
        self.scheduler.abort(request_id, client_id, index)

    def step(self) -> list[RequestUpdate]:
        """Runs one step. An exception that one request causes fails that request alone, found by halving.

        Raises:
            EngineDeadError: A worker is gone, or its device is.
        """
        try:
            return self._step()
        except BaseException:
            # Ctrl-C, above all: nobody knows what it interrupted.
            self._running = None
            self.scheduler.reset()
            raise

    def stats(self) -> EngineStats:
        """A reading between two steps."""
        return self.scheduler.stats()

    def view(self) -> EngineView:
        """Who holds which block, between two steps."""
        return self.scheduler.view()

    def close(self) -> None:
        """Frees the model and the KV cache. May be called twice."""
        self._running = None
        self._executor.close()
        if self._profile is not None:
            self._profile.close()
            self._profile = None

    def _step(self) -> list[RequestUpdate]:
        running, self._running = self._running or self._start(), None
        if running is None:
            # All the suspects have ended, or there is nothing to do.
            del self._suspects[-1:]
            return []
        step = running.step
        num_tokens = sum(len(entry.token_ids) for entry in step.sequences)
        following = self._start_following(step)
        try:
            with self.span("wait"):
                output: StepOutput = running.pending.result()
        except EngineDeadError:
            raise
        except Exception as error:
            if following is not None:
                with suppress(Exception):  # It went on from what this step should have left.
                    following.pending.result()
            self._executor.check()
            return self._step_failed(error, num_tokens)
        del self._suspects[-1:]
        with self.span("apply"):
            updates = self.scheduler.apply(step, output)
        self._running = following
        if self._profile is not None:
            self._profile.end_step(num_tokens, output.spans)
        return updates

    def _start(self) -> _Running | None:
        """The next step, on its way."""
        with self.span("schedule"):
            step = self.scheduler.schedule(only=self._next_suspects())
        if step is None:
            return None
        if self.on_step is not None:
            self.on_step(self.scheduler.scheduled())
        return self._submit(step)

    def _start_following(self, step: Step) -> _Running | None:
        """The step behind one that runs, if it can be made already. Its requests are among that one's: `on_step` knows them."""
        if self._can_follow is None or self._suspects or self._alone or not self._can_follow(step):
            return None
        with self.span("schedule"):
            following = self.scheduler.schedule_following(step)
        return None if following is None else self._submit(following)

    def _submit(self, step: Step) -> _Running:
        with self.span(EXECUTE):
            return _Running(step, self._executor.submit(step))

    def _next_suspects(self) -> list[Request] | None:
        if self._suspects:
            return self._suspects[-1]
        while self._alone and not self.scheduler.is_alive(self._alone[0]):
            self._alone.popleft()
        return [self._alone[0]] if self._alone else None

    def _step_failed(self, error: Exception, num_tokens: int) -> list[RequestUpdate]:
        """Nothing of the step counts. Its requests run again in halves, until the culprit is alone, and fails.

        When memory ran out there may be no culprit: then steps get smaller first.
        """
        requests = self.scheduler.rollback()
        if not requests:
            return []  # All of them ended while it was on its way.
        if isinstance(error, OutOfMemoryError):
            if self.scheduler.make_smaller_steps(num_tokens, requests):
                logger.warning("A step of %d tokens found too little memory; smaller ones follow. %s", num_tokens, error)
                return []
            error = OutOfMemoryError(
                f"A step of {num_tokens} tokens of this request alone ({requests[0].num_prompt_tokens} prompt tokens, "
                f"{requests[0].source.params.num_sequences} sequences) found too little memory. Make it shorter, or give the "
                f"engine more memory, such as by a smaller KV cache. {error}"
            )
        del self._suspects[-1:]
        if len(requests) > 1:
            middle = len(requests) // 2
            self._suspects += [requests[middle:], requests[:middle]]
            return []
        request_id = requests[0].source.request_id
        if isinstance(error, InvalidRequestError):
            logger.info("The request %s can't be served: %s", request_id, error)
            return [self.scheduler.fail(requests[0], str(error), is_invalid=True, param=error.param)]
        logger.error("The request %s made its step fail.", request_id, exc_info=error)
        # What is no error of ours may tell of paths and addresses, and the request's client may be anybody.
        told = str(error) if isinstance(error, CacheflowError) else "The engine's log says more."
        return [self.scheduler.fail(requests[0], f"{type(error).__name__}: {told}", is_invalid=False)]

    def _check_token_ids(self, request: EngineRequest) -> None:
        params, vocab_size = request.params, self.info.vocab_size
        for name, token_ids in (
            ("prompt", request.prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            *(("resumed", sequence.token_ids) for sequence in request.resumed),
        ):
            if token_ids and not (0 <= min(token_ids) and max(token_ids) < vocab_size):
                bad = next(t for t in token_ids if not 0 <= t < vocab_size)
                raise InvalidRequestError(
                    f"{name} has the token id {bad}; the model's ids go from 0 to {vocab_size - 1}.", param=name
                )
