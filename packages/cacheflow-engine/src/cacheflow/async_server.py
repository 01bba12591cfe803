"""`AsyncLLMServer`: generation for asyncio programs, on an engine in a process of its own.

It owns the text side of each request: tokens in, text and stop strings out. It knows the engine only as an `EngineClient`,
whether supervised here or running elsewhere, and imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from functools import partial
from types import TracebackType
from typing import Literal

from cacheflow.config import EngineConfig
from cacheflow.errors import EngineDeadError, InvalidRequestError
from cacheflow.metrics import Metrics
from cacheflow.service.client import REJOIN_TIMEOUT_S, EngineClient
from cacheflow.service.supervisor import EngineProcess
from cacheflow.text.assembler import RequestAssembler
from cacheflow.text.embedding import embedding_output
from cacheflow.text.requests import make_embed_request, make_request
from cacheflow.text.tokenizer import Tokenizer
from cacheflow.types import (
    FINISH_STOP,
    EmbeddingOutput,
    EngineRequest,
    EngineStats,
    EngineView,
    ModelInfo,
    RequestOutput,
    SamplingParams,
)

logger = logging.getLogger(__name__)

LONG_TEXT = 20_000
"""Prompts with more characters are tokenised in a thread, so that the event loop is not held up."""
CHECK_TIMEOUT_S = 30.0
"""How long tokenising a long prompt and checking a structured output may take."""


class AsyncLLMServer:
    """Generates for many callers at once. Made by `start` or `connect`, and to be closed; `async with` closes it.

    Example:
        async with await AsyncLLMServer.start(EngineConfig(model="demo")) as server:
            async for output in server.generate("The capital of France is", SamplingParams(temperature=0)):
                print(output.outputs[0].text)

    Attributes:
        tokenizer: The model's.
        metrics: What is measured of its requests.
    """

    def __init__(self, client: EngineClient, process: EngineProcess | None) -> None:
        self.tokenizer = Tokenizer(client.model_info.tokenizer, client.model_info.vocab_size)
        self.metrics = Metrics(client.model_info)
        self._client = client
        self._process = process
        self._watch = None if process is None else asyncio.create_task(self._keep_alive(process))
        self._last_death: EngineDeadError | None = None
        self._is_given_up = asyncio.Event()

    @classmethod
    async def start(cls, config: EngineConfig) -> AsyncLLMServer:
        """Starts an engine in a child process and waits until it is ready. The child ends with this process.

        If the child dies, it is started again, and unfinished requests go on where they were.

        Raises:
            CacheflowError: The model can't be loaded, for the reasons that `LLM` has.
            EngineDeadError: The process ended before it was ready.
        """
        process = await EngineProcess.start(config)
        try:
            client = await process.connect()
            try:
                return cls(client, process)
            except BaseException:
                await client.close()
                raise
        except BaseException:
            await process.close()
            raise

    @classmethod
    async def connect(
        cls,
        address: str,
        timeout_s: float = 60.0,
        rejoin_timeout_s: float = REJOIN_TIMEOUT_S,
        key_file: str | None = None,
    ) -> AsyncLLMServer:
        """Uses an engine that runs elsewhere: `cacheflow engine --listen ADDRESS`.

        Args:
            address: `ipc:///path`, a path, or `tcp://host:port`.
            timeout_s: How long to wait for an answer. An engine that answers that it is loading is waited for.
            rejoin_timeout_s: The same, when the engine is lost later. If one answers at its address in that time, unfinished
                requests go on there; otherwise they get an `EngineDeadError`.
            key_file: The engine's key (`--engine-key`), for TCP; needed for another machine.

        Raises:
            ConfigError: The address is not one, or on another machine and there is no key, or the key can't be read.
            EngineDeadError: Nobody answers, or the two sides speak different versions.
            CacheflowError: The engine could not load its model.
        """
        client = await EngineClient.connect(address, timeout_s, rejoin_timeout_s, key_file)
        try:
            return cls(client, None)
        except BaseException:
            await client.close()
            raise

    async def __aenter__(self) -> AsyncLLMServer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def model_info(self) -> ModelInfo:
        """The served model."""
        return self._client.model_info

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken, as far as is known: the engine is there, and nobody is ending."""
        return self._client.is_alive and not self._client.is_draining

    @property
    def is_draining(self) -> bool:
        """Whether this server or its engine is ending, so that new requests are refused while running ones are finished."""
        return self._client.is_draining

    def generate(
        self,
        prompt: str | list[int],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates for one prompt; each output has everything so far, the last one is `finished`.

        The request is checked at once, and sent when iteration begins. A text of over `LONG_TEXT` characters, or a structured
        output, is checked only then, in a thread. Leaving the iterator early, by `break`, an exception or cancellation, aborts
        it.

        Args:
            prompt: Text, or token ids that are taken as they are.
            sampling_params: None: the defaults.
            request_id: Unique among this server's unfinished requests. None: drawn.
            priority: Smaller is sooner, under the `priority` policy.
            cache_salt: Requests share cached blocks only under equal salts.

        Raises:
            InvalidRequestError: The request can't be served, or its id is in use.
            EngineOverloadedError: The engine's waiting room is full; its kind `EngineDrainingError`: it is ending.
            RequestFailedError: The request failed inside the engine.
            EngineDeadError: The engine ended or can't be reached.
        """
        text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        make = partial(
            make_request,
            self.model_info,
            self.tokenizer,
            text,
            token_ids,
            sampling_params,
            secrets.token_hex(8) if request_id is None else request_id,
            priority=priority,
            cache_salt=cache_salt,
            client_id=self._client.client_id,
        )
        if (text is not None and len(text) > LONG_TEXT) or (sampling_params is not None and sampling_params.structured):
            return self._stream_checked(make, text)
        return self._stream(make(), text)

    async def embed(
        self,
        prompt: str | list[int],
        request_id: str | None = None,
        *,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str = "",
    ) -> EmbeddingOutput:
        """A vector for a prompt: what its last layer, behind the final norm, says of it. Cancelling aborts the request.

        Args:
            prompt: Text, or token ids that are taken as they are; it may fill the whole context.
            request_id: Unique among this server's unfinished requests. None: drawn.
            pooling: The mean over the prompt's tokens, or what stands at the last one.
            normalize: Scale the vector to length 1, as OpenAI's are.
            priority: Smaller is sooner, under the `priority` policy.
            cache_salt: Later requests find the blocks of this one only under an equal salt.

        Raises:
            InvalidRequestError: The request can't be served, or its id is in use.
            EngineOverloadedError: The engine's waiting room is full; its kind `EngineDrainingError`: it is ending.
            RequestFailedError: The request failed inside the engine.
            EngineDeadError: The engine ended or can't be reached.
        """
        text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        make = partial(
            make_embed_request,
            self.model_info,
            self.tokenizer,
            text,
            token_ids,
            secrets.token_hex(8) if request_id is None else request_id,
            pooling=pooling,
            priority=priority,
            cache_salt=cache_salt,
            client_id=self._client.client_id,
        )
        request = await asyncio.to_thread(make) if text is not None and len(text) > LONG_TEXT else make()
        with self.metrics.request(request) as timer:
            async with contextlib.aclosing(self._client.submit(request)) as updates:
                update = await anext(updates)
            output = embedding_output(request, update, text, normalize=normalize)
            timer.finish(FINISH_STOP)
        return output

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gives a last output with the finish reason "abort". An unknown id is ignored."""
        self._client.abort(request_id)

    async def stats(self) -> EngineStats:
        """A reading of the engine.

        Raises:
            EngineDeadError: The engine ended or can't be reached.
        """
        return await self._client.stats()

    async def view(self) -> EngineView:
        """Who holds which block of the engine.

        Raises:
            EngineDeadError: The engine ended or can't be reached.
        """
        return await self._client.view()

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests from now on (`EngineDrainingError`) and waits until those that run have ended.

        Args:
            timeout_s: After this long they end with an `EngineDrainingError`.
        """
        await self._client.drain(timeout_s)

    async def given_up(self) -> EngineDeadError:
        """Waits until the engine's process has died so often that it is not started again, and says how.

        An engine that runs elsewhere is never given up: somebody else may start it again.
        """
        await self._is_given_up.wait()
        assert self._last_death is not None
        return self._last_death

    async def close(self) -> None:
        """Aborts what is unfinished, leaves the engine, and ends it if it was started here. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
        await self._client.close()
        if self._process is not None:
            await self._process.close()

    async def _stream_checked(
        self, make: Callable[[], EngineRequest], prompt: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        try:
            request = await asyncio.wait_for(asyncio.to_thread(make), CHECK_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise InvalidRequestError(
                f"The request's text or structure could not be checked within {CHECK_TIMEOUT_S:g} s. Make it smaller."
            ) from None
        async with contextlib.aclosing(self._stream(request, prompt)) as outputs:
            async for output in outputs:
                yield output

    async def _stream(self, request: EngineRequest, prompt: str | None) -> AsyncGenerator[RequestOutput, None]:
        logger.debug("Request %s: prompt %r, %s", request.request_id, prompt or request.prompt_token_ids, request.params)
        assembler = RequestAssembler(self.tokenizer, request, prompt)
        with self.metrics.request(request) as timer:
            async with contextlib.aclosing(self._client.submit(request)) as updates:
                async for update in updates:
                    failure = update.exception()
                    if failure is not None:
                        raise failure
                    output = assembler.apply(update)
                    for index in assembler.take_stopped():
                        if not output.finished:
                            self._client.abort(request.request_id, index)
                    timer.update(update, output)
                    yield output
                    if output.finished:
                        return  # If stop strings ended it, the engine does not know yet: leaving `updates` tells it.

    async def _keep_alive(self, process: EngineProcess) -> None:
        end = await process.keep_alive()
        logger.critical("%s.", end)
        self._last_death = EngineDeadError(f"{end}.")
        self._client.fail(self._last_death)
        self._is_given_up.set()
