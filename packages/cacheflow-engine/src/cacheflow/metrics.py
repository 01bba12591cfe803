"""What a server measures of its requests, in Prometheus' form and as a summary of the last minute.

It owns every metric's name, labels and buckets. Times are the client side's, so they include waiting and the socket; the
engine's own numbers come from `EngineStats`. The only labels are the model's name and few reasons, so that nothing a client
sends can make the number of series grow. It knows no HTTP; prometheus_client is imported when a `Metrics` is made.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from cacheflow.errors import EngineDeadError, EngineDrainingError, EngineOverloadedError
from cacheflow.types import FINISH_ABORT, FINISH_ERROR, EngineRequest, EngineStats, ModelInfo, RequestOutput, RequestUpdate

if TYPE_CHECKING:
    from types import TracebackType

PREFIX = "cacheflow:"
ENGINE_TIMEOUT_S = 2.0
"""How long an exposition waits for the engine's numbers, before it goes out without them."""
WINDOW_S = 60.0
"""What the summary covers."""
RATE_WINDOW_S = 10.0
"""What tokens per second are averaged over."""
MAX_SAMPLES = 4096
"""Most samples that the summary keeps of one quantity."""

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
FEW = (1, 2, 3, 4, 5, 8, 10, 16, 20, 32, 64, 128)

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", LONG_S),
    "inter_token_latency_seconds": ("Between two deliveries of tokens of one request.", SHORT_S),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", LONG_S),
    "request_time_per_output_token_seconds": ("Mean time per token after the first, of a finished request.", SHORT_S),
    "request_prompt_tokens": ("Tokens of a request's prompt.", COUNTS),
    "request_generation_tokens": ("Tokens generated for a request, over all its sequences.", COUNTS),
    "request_params_n": ("The n of requests.", FEW),
    "request_params_max_tokens": ("The max_tokens of requests, as far as the context has room.", COUNTS),
}
"""Of the requests of this server: name → what it is, buckets."""

COUNTERS: dict[str, tuple[str, str]] = {
    "request_success": ("Requests that ended, by how: stop, length, abort (the client left) or error.", "finished_reason"),
    "admission_rejections": ("Requests that were not taken in: overloaded, draining or engine_unavailable.", "reason"),
}
"""Of the requests of this server: name → what it is, its label."""

ENGINE_GAUGES: dict[str, str] = {
    "num_requests_running": "Requests that hold KV blocks.",
    "num_requests_waiting": "Requests that wait for a first or a further turn.",
    "kv_cache_usage_perc": "Share of the KV blocks that requests hold, from 0 to 1.",
    "num_kv_blocks": "KV blocks in all.",
    "num_cached_kv_blocks": "KV blocks that no request holds, kept for their content.",
}
ENGINE_COUNTERS: dict[str, str] = {
    "num_preemptions": "Requests that lost their blocks.",
    "prompt_tokens": "Prompt tokens taken in.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "engine_steps": "Steps run.",
}
ENGINE_UP = "Whether the engine gave its numbers (1); if not (0), they are left out."


class Server(Protocol):
    """What an exposition needs of an `AsyncLLMServer`."""

    async def stats(self) -> EngineStats:
        """A reading of the engine."""
        ...


class Metrics:
    """The measurements of one server, in a registry of their own.

    Example:
        with metrics.request(request) as timer:
            async for update in updates:
                timer.update(update, output)
    """

    def __init__(self, model_info: ModelInfo) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        model = model_info.model
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(PREFIX + name, text, ["model_name"], registry=self._registry, buckets=buckets).labels(model)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(PREFIX + name, text, ["model_name", label], registry=self._registry)
            for name, (text, label) in COUNTERS.items()
        }
        self._model = model
        self._reading = _EngineReading(model)
        self._registry.register(self._reading)
        self._recent = {name: _Recent() for name in ("ttft_s", "itl_s", "e2e_s")}
        self._num_tokens_by_second: deque[tuple[int, int]] = deque(maxlen=int(WINDOW_S))

    def request(self, request: EngineRequest) -> RequestTimer:
        """A timer for one request, to be entered when it is sent; leaving it says how the request ended."""
        return RequestTimer(self, request)

    async def exposition(self, server: Server) -> bytes:
        """Everything in Prometheus' text format. An engine that gives no numbers is left out, and `engine_up` is 0."""
        from prometheus_client import generate_latest

        try:
            self._reading.stats = await asyncio.wait_for(server.stats(), ENGINE_TIMEOUT_S)
        except (EngineDeadError, EngineOverloadedError, asyncio.TimeoutError):
            self._reading.stats = None
        return generate_latest(_WithoutCreated(self._registry))

    def summary(self) -> dict[str, Any]:
        """The last minute: percentiles of TTFT, ITL and E2E in seconds (null where there was nothing), and tokens/s."""
        now = time.monotonic()
        num_tokens = sum(num for second, num in self._num_tokens_by_second if second > now - RATE_WINDOW_S - 1)
        percentiles = {name: recent.percentiles(now) for name, recent in self._recent.items()}
        return {"window_s": WINDOW_S, **percentiles, "output_tokens_per_s": num_tokens / RATE_WINDOW_S}

    def observe(self, name: str, value: float) -> None:
        """Adds a value to one of `HISTOGRAMS`."""
        self._histograms[name].observe(value)

    def note(self, name: str, value: float) -> None:
        """Adds a value to what the summary covers."""
        self._recent[name].add(value)

    def count(self, name: str, reason: str) -> None:
        """Adds one to one of `COUNTERS`."""
        self._counters[name].labels(self._model, reason).inc()

    def count_tokens(self, num_tokens: int) -> None:
        """Tokens that were given out now."""
        second = int(time.monotonic())
        if self._num_tokens_by_second and self._num_tokens_by_second[-1][0] == second:
            num_tokens += self._num_tokens_by_second.pop()[1]
        self._num_tokens_by_second.append((second, num_tokens))


class RequestTimer:
    """Measures one request, as a context manager around its life."""

    def __init__(self, metrics: Metrics, request: EngineRequest) -> None:
        self._metrics = metrics
        self._request = request
        self._start_s = self._first_s = self._last_s = self._end_s = 0.0
        self._num_tokens = 0
        self._longest = 0
        self._finish_reason: str | None = None

    def __enter__(self) -> RequestTimer:
        self._start_s = time.perf_counter()
        return self

    def finish(self, reason: str) -> None:
        """The request has ended, and why."""
        self._end_s = time.perf_counter()
        self._finish_reason = reason

    def update(self, update: RequestUpdate, output: RequestOutput) -> None:
        """Tokens have come, or the end."""
        num_new = sum(len(sequence.new_token_ids) for sequence in update.sequences)
        if num_new:
            now = time.perf_counter()
            name, histogram, since = (
                ("itl_s", "inter_token_latency_seconds", self._last_s)
                if self._num_tokens
                else ("ttft_s", "time_to_first_token_seconds", self._start_s)
            )
            self._metrics.observe(histogram, now - since)
            self._metrics.note(name, now - since)
            self._metrics.count_tokens(num_new)
            self._first_s = self._first_s or now
            self._last_s = now
            self._num_tokens += num_new
        if output.finished:
            self._longest = max((len(sequence.token_ids) for sequence in output.outputs), default=0)
            self.finish(next((s.finish_reason for s in output.outputs if s.finish_reason), FINISH_ABORT))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        metrics = self._metrics
        if isinstance(error, EngineOverloadedError) and not self._num_tokens:
            reason = "draining" if isinstance(error, EngineDrainingError) else "overloaded"
            metrics.count("admission_rejections", reason)
            return
        if isinstance(error, EngineDeadError) and not self._num_tokens:
            metrics.count("admission_rejections", "engine_unavailable")
            return
        if self._finish_reason is None:
            # Leaving the iterator early is how a client that went away looks from here.
            is_left = error is None or not isinstance(error, Exception)
            self._finish_reason = FINISH_ABORT if is_left else FINISH_ERROR
        metrics.count("request_success", self._finish_reason)
        if self._finish_reason in (FINISH_ABORT, FINISH_ERROR):
            return
        metrics.observe("e2e_request_latency_seconds", self._end_s - self._start_s)
        metrics.note("e2e_s", self._end_s - self._start_s)
        if self._longest > 1 and self._last_s > self._first_s:
            mean_s = (self._last_s - self._first_s) / (self._longest - 1)
            metrics.observe("request_time_per_output_token_seconds", mean_s)
        metrics.observe("request_prompt_tokens", len(self._request.prompt_token_ids))
        if self._request.task == "embed":
            return  # What follows is of texts.
        params = self._request.params
        metrics.observe("request_generation_tokens", self._num_tokens)
        metrics.observe("request_params_n", params.n)
        if params.max_tokens is not None:
            metrics.observe("request_params_max_tokens", params.max_tokens)


class _Recent:
    """The samples of the last minute, or the newest of them where there are many."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, value: float) -> None:
        self._samples.append((time.monotonic(), value))

    def percentiles(self, now: float) -> dict[str, float] | None:
        values = sorted(value for at, value in self._samples if at >= now - WINDOW_S)
        if not values:
            return None
        last = len(values) - 1
        return {f"p{rank}": values[round(last * rank / 100)] for rank in (50, 90, 99)} | {"num_samples": len(values)}


class _WithoutCreated:
    """A registry without the times at which each of its series began, which nobody asks for and which double their number."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Any]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _EngineReading:
    """Gives the registry the engine's own numbers, as they were last read."""

    def __init__(self, model: str) -> None:
        self.stats: EngineStats | None = None
        self._model = model

    def describe(self) -> Iterable[Any]:
        return self.collect()

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def one(family: type[Any], name: str, text: str, value: float) -> Any:
            made = family(PREFIX + name, text, labels=["model_name"])
            made.add_metric([self._model], value)
            return made

        yield one(GaugeMetricFamily, "engine_up", ENGINE_UP, self.stats is not None)
        if self.stats is None:
            return
        values = _engine_values(self.stats)
        for name, text in ENGINE_GAUGES.items():
            yield one(GaugeMetricFamily, name, text, values[name])
        for name, text in ENGINE_COUNTERS.items():
            yield one(CounterMetricFamily, name, text, values[name])


def _engine_values(stats: EngineStats) -> dict[str, float]:
    num_held = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
    return {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "kv_cache_usage_perc": num_held / max(stats.num_blocks, 1),
        "num_kv_blocks": stats.num_blocks,
        "num_cached_kv_blocks": stats.num_cached_blocks,
        "num_preemptions": stats.num_preemptions,
        "prompt_tokens": stats.num_prompt_tokens,
        "generation_tokens": stats.num_generated_tokens,
        "prefix_cache_queries": stats.num_prompt_tokens,
        "prefix_cache_hits": stats.num_cached_tokens,
        "engine_steps": stats.num_steps,
    }
