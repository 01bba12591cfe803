"""`LLM`: generation in the caller's own process and thread, for scripts, notebooks and batch jobs.

It owns an `EngineCore` and drives it: nothing happens between calls. It opens no socket and starts no process.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.errors import CacheflowError, InvalidRequestError
from cacheflow.text.assembler import RequestAssembler
from cacheflow.text.embedding import embedding_output
from cacheflow.text.requests import make_embed_request, make_request
from cacheflow.text.tokenizer import Tokenizer
from cacheflow.types import (
    FINISH_ERROR,
    CompletionOutput,
    EmbeddingOutput,
    EngineRequest,
    EngineStats,
    ModelInfo,
    RequestOutput,
    RequestUpdate,
    SamplingParams,
)

Prompt = str | list[int]


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `LLM.generate`. The unfinished requests were aborted and the `LLM` can be used again.

    Attributes:
        outputs: One per prompt; None for those that had not finished.
    """

    def __init__(self, outputs: list[RequestOutput | None]) -> None:
        super().__init__("interrupted")
        self.outputs = outputs


class LLM:
    """A model, ready to generate.

    Example:
        llm = LLM(model="demo")
        for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0.8, top_p=0.95)):
            print(output.prompt, output.outputs[0].text)

    Args:
        model: A hub name, a folder, a GGUF file, or "demo".
        tensor_parallel_size: Devices that share each layer.
        dtype: Of weights and arithmetic; see `EngineConfig.dtype`.
        seed: Where the seeds of requests that set none come from.
        **options: Any other field of `EngineConfig`. Nobody watches streams here, so `prompt_chunk_size` is the step's budget
            unless given.

    Attributes:
        tokenizer: The model's.

    Raises:
        CacheflowError: The model can't be found or loaded, an option doesn't hold, or memory doesn't suffice.
    """

    def __init__(self, model: str, tensor_parallel_size: int = 1, dtype: str = "auto", seed: int = 0, **options: Any) -> None:
        options.setdefault("prompt_chunk_size", options.get("max_num_batched_tokens", EngineConfig.max_num_batched_tokens))
        config = EngineConfig.from_mapping(
            {"model": model, "tensor_parallel_size": tensor_parallel_size, "dtype": dtype, "seed": seed, **options}
        )
        self._core = EngineCore(config)
        self.tokenizer = Tokenizer(self._core.info.tokenizer, self._core.info.vocab_size)
        self._seeds = random.Random(seed)
        self._num_requests = 0
        self._running: dict[str, _Running] = {}

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def model_info(self) -> ModelInfo:
        """The model's numbers and tokenizer."""
        return self._core.info

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Sequence[list[int]] | None = None,
        use_tqdm: bool = True,
        *,
        raise_errors: bool = False,
    ) -> list[RequestOutput]:
        """Generates for all prompts, batched, and returns the outputs in the order of the prompts.

        Args:
            prompts: A text or several. May be left out when `prompt_token_ids` is given.
            sampling_params: One for all prompts, or one per prompt. None: the defaults.
            prompt_token_ids: The prompts' tokens, taken as they are.
            use_tqdm: Show a progress bar with tokens per second.
            raise_errors: Raise for the first prompt that can't be served. Otherwise its output carries the error, and the
                others are served.

        Raises:
            InvalidRequestError: Prompts and parameters don't match in number; or, with `raise_errors`, a bad prompt.
            RequestFailedError: With `raise_errors`: a request failed inside the engine.
            GenerationInterrupted: Ctrl-C; it carries the outputs that had finished.
        """
        texts, token_ids = _as_lists(prompts, prompt_token_ids)
        outputs: list[RequestOutput | None] = [None] * len(texts or token_ids or ())
        progress = _Progress(len(outputs), is_shown=use_tqdm)
        try:
            for position, output in self._run(texts, token_ids, sampling_params, raise_errors=raise_errors):
                outputs[position] = output
                progress.add(output)
        except KeyboardInterrupt:
            raise GenerationInterrupted(outputs) from None
        finally:
            progress.close()
        finished = [output for output in outputs if output is not None]
        assert len(finished) == len(outputs)
        return finished

    def generate_iter(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like `generate`, giving each finished output with its prompt's position as soon as it is there.

        A prompt is a text or a list of token ids. Leaving the iterator early aborts the rest.
        """
        texts = [p if isinstance(p, str) else None for p in prompts]
        token_ids = [None if isinstance(p, str) else p for p in prompts]
        return self._run(texts, token_ids, sampling_params, raise_errors=False)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generates for one prompt; each output has everything so far, the last one is `finished`.

        Leaving the iterator early aborts the request.

        Raises:
            InvalidRequestError: The prompt or the parameters can't be served.
            RequestFailedError: The request failed inside the engine.
        """
        news: deque[_Running] = deque()
        text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        running = self._start(text, token_ids, sampling_params, 0, news)
        try:
            while not running.assembler.finished or news:
                while not news:
                    self._step()
                news.clear()
                running.raise_failure()
                yield running.assembler.output()
        finally:
            self._end(running)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
    ) -> list[EmbeddingOutput]:
        """A vector for each prompt: what its last layer, behind the final norm, says of it.

        Args:
            prompts: A text, a list of token ids, or several of either.
            pooling: The mean over the prompt's tokens, or what stands at the last one.
            normalize: Scale each vector to length 1, as OpenAI's are.

        Raises:
            InvalidRequestError: A prompt can't be served; none is then.
            RequestFailedError: A request failed inside the engine.
        """
        is_single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        all_prompts: Sequence[Any] = [prompts] if is_single else prompts
        requests: dict[str, tuple[int, str | None, EngineRequest]] = {}
        outputs: dict[int, EmbeddingOutput] = {}
        for position, prompt in enumerate(all_prompts):
            self._num_requests += 1
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
            name = str(self._num_requests)
            request = make_embed_request(self._core.info, self.tokenizer, text, ids, name, pooling=pooling)
            requests[name] = (position, text, request)
        try:
            for _, _, request in requests.values():
                self._core.add(request)
            while len(outputs) < len(requests):
                for update in self._step():
                    if update.request_id in requests:
                        position, text, request = requests[update.request_id]
                        outputs[position] = embedding_output(request, update, text, normalize=normalize)
        finally:
            for name in requests:
                self._core.abort(name)
        return [outputs[position] for position in range(len(outputs))]

    def stats(self) -> EngineStats:
        """What the engine has done so far, and how full its KV cache is."""
        return self._core.stats()

    def close(self) -> None:
        """Frees the model and the KV cache. May be called twice."""
        self._core.close()

    def _run(
        self,
        texts: Sequence[str | None] | None,
        token_ids: Sequence[list[int] | None] | None,
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        raise_errors: bool,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Adds all requests, then steps until the last has finished. Those left at an early end are aborted."""
        num_prompts = len(texts if texts is not None else token_ids or ())
        all_params = _one_each(params, num_prompts)
        news: deque[_Running] = deque()
        unfinished: dict[int, _Running] = {}
        try:
            for position in range(num_prompts):
                text = texts[position] if texts is not None else None
                ids = token_ids[position] if token_ids is not None else None
                try:
                    unfinished[position] = self._start(text, ids, all_params[position], position, news)
                except InvalidRequestError as error:
                    if raise_errors:
                        raise
                    yield position, _refused(str(self._num_requests), text, ids, error)
            while unfinished:
                while not news:
                    self._step()
                running = news.popleft()
                if running.assembler.finished and running.position in unfinished:
                    self._end(unfinished.pop(running.position))
                    if raise_errors:
                        running.raise_failure()
                    yield running.position, running.assembler.output()
        finally:
            for running in unfinished.values():
                self._end(running)

    def _start(
        self,
        text: str | None,
        token_ids: list[int] | None,
        params: SamplingParams | None,
        position: int,
        news: deque[_Running],
    ) -> _Running:
        self._num_requests += 1
        info, name = self._core.info, str(self._num_requests)
        request = make_request(info, self.tokenizer, text, token_ids, params, name, seeds=self._seeds)
        self._core.add(request)
        running = _Running(position, request, RequestAssembler(self.tokenizer, request, text), news)
        self._running[name] = running
        return running

    def _step(self) -> list[RequestUpdate]:
        """One step of the core, whose updates go to whoever waits for them: several iterators may be open at once."""
        updates = self._core.step()
        with self._core.span("detokenise"):
            for update in updates:
                running = self._running.get(update.request_id)
                if running is None:
                    continue
                running.assembler.add(update)
                running.failure = update.exception()
                for index in running.assembler.take_stopped():
                    self._core.abort(update.request_id, index=index)
                running.news.append(running)
        return updates

    def _end(self, running: _Running) -> None:
        self._core.abort(running.request.request_id)
        self._running.pop(running.request.request_id, None)


@dataclass(eq=False)
class _Running:
    """A request between its start and its end.

    Attributes:
        position: Of its prompt among those of the call.
        request: As the core has it.
        assembler: What has come of it.
        news: Where it is put whenever something has come; shared by all requests of a call.
        failure: Why it failed, if it did.
    """

    position: int
    request: EngineRequest
    assembler: RequestAssembler
    news: deque[_Running]
    failure: CacheflowError | None = None

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure


class _Progress:
    """A progress bar over requests, with the rate of output tokens."""

    def __init__(self, num_prompts: int, *, is_shown: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=num_prompts, desc="Generating", unit="prompt", disable=not is_shown, dynamic_ncols=True)
        self._num_tokens = 0

    def add(self, output: RequestOutput) -> None:
        self._num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        if not self._bar.disable:
            elapsed_s = max(self._bar.format_dict["elapsed"], 1e-6)
            self._bar.set_postfix_str(f"{self._num_tokens / elapsed_s:.1f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _as_lists(
    prompts: str | Sequence[str] | None, prompt_token_ids: Sequence[list[int]] | None
) -> tuple[list[str] | None, list[list[int]] | None]:
    if prompts is None and prompt_token_ids is None:
        raise InvalidRequestError("Give prompts, prompt_token_ids, or both.", param="prompts")
    texts = None if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    token_ids = None if prompt_token_ids is None else list(prompt_token_ids)
    if token_ids and not all(isinstance(ids, Sequence) for ids in token_ids):
        raise InvalidRequestError(
            "prompt_token_ids must be a list of lists of token ids, one per prompt.", param="prompt_token_ids"
        )
    if texts is not None and token_ids is not None and len(texts) != len(token_ids):
        raise InvalidRequestError(
            f"{len(texts)} prompts and {len(token_ids)} lists of token ids: there must be as many.", param="prompt_token_ids"
        )
    return texts, token_ids


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidRequestError("sampling_params must be a SamplingParams, or a list of them.", param="sampling_params")
    if len(params) != num_prompts:
        raise InvalidRequestError(
            f"{num_prompts} prompts and {len(params)} sampling parameters: give one for all, or one per prompt.",
            param="sampling_params",
        )
    return params


def _refused(request_id: str, text: str | None, token_ids: list[int] | None, error: InvalidRequestError) -> RequestOutput:
    empty = CompletionOutput(index=0, text="", token_ids=[], cumulative_logprob=0.0, finish_reason=FINISH_ERROR)
    return RequestOutput(
        request_id=request_id, prompt=text, prompt_token_ids=token_ids or [], outputs=[empty], finished=True, error=str(error)
    )
