"""Where the time of steps goes: spans of a step, a table of their sums, and a trace for Perfetto or chrome://tracing.

Whoever works on a step records spans; they travel as plain tuples, so that those of a worker in another process fit in. It
knows neither models nor requests, and costs nothing where no profile is asked for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter_ns
from typing import Any, TypeVar

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

Span = tuple[str, int, int]
"""Name, start and duration, both in ns. The clock is the machine's monotonic one, which its processes share."""

STEPS_PER_TABLE = 1000
MAX_TRACE_EVENTS = 500_000
"""About 50 MB of JSON, and 1,500 steps of a model with 30 layers. Later spans are counted in the table and not traced."""

EXECUTE = "execute"
"""The span of a step that holds all of the worker's: handing it over. A device that goes on by itself is waited for later."""

SpanMaker = Callable[[str], AbstractContextManager[None]]


def no_span(name: str) -> AbstractContextManager[None]:
    """Stands in for `Spans.span` where no profile is asked for."""
    return _NOTHING


_NOTHING = nullcontext()


class Spans:
    """What has been recorded since the last `take`."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Records the time inside the `with`."""
        start = perf_counter_ns()
        try:
            yield
        finally:
            self._spans.append((name, start, perf_counter_ns() - start))

    def timed(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """`function`, each of whose calls is recorded."""

        def call(*arguments: Any, **named: Any) -> Result:
            start = perf_counter_ns()
            result = function(*arguments, **named)
            self._spans.append((name, start, perf_counter_ns() - start))
            return result

        return call

    def take(self) -> tuple[Span, ...]:
        """Hands over what was recorded."""
        taken, self._spans = tuple(self._spans), []
        return taken


class TimedOps:
    """An op provider whose calls are recorded, under the names of its methods.

    An op that returns a function, as `linear` does, is a maker: that function is recorded, under the maker's name and the
    shape of the weight that it was made from.
    """

    decoder = None
    """Layers run op by op, so that each op can be seen, where the provider would fuse them."""

    def __init__(self, ops: Any, spans: Spans) -> None:
        self._ops = ops
        self._spans = spans

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if not callable(found):
            return found
        timed = self._spans.timed(f"forward: {name}", found)

        def call(*arguments: Any, **named: Any) -> Any:
            if not name.endswith("linear"):
                return timed(*arguments, **named)
            rows, columns = arguments[0].shape[-2:]
            return self._spans.timed(f"forward: {name} {columns} to {rows}", found(*arguments, **named))

        return call


class StepProfile(Spans):
    """Sums of spans by name, and the first of them for a trace.

    Args:
        trace: The file to write the trace to when it is closed, or None.
        is_logged: Whether the table goes to the log, every 1,000 steps and at the end.
    """

    def __init__(self, trace: str | None, is_logged: bool) -> None:
        super().__init__()
        self._trace = None if trace is None else Path(trace)
        self._is_logged = is_logged
        self._events: list[tuple[str, int, int, int]] = []
        self._sums: tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]] = ({}, {})
        self._num_steps = 0
        self._num_tokens = 0

    def end_step(self, num_tokens: int, others: Iterable[Span] = ()) -> None:
        """A step has ended that computed so many tokens; `others` are spans that a worker recorded in it."""
        self._add(self.take(), 0)
        self._add(others, 1)
        self._num_steps += 1
        self._num_tokens += num_tokens
        if self._is_logged and self._num_steps % STEPS_PER_TABLE == 0:
            logger.info("%s", self.table())

    def table(self) -> str:
        """What the spans add up to, the dearest first. Indented names lie inside `execute`."""
        outer, inner = self._sums
        whole = max(1, sum(duration for _, duration in outer.values()))
        lines = [
            f"{self._num_steps} steps, {self._num_tokens} tokens computed",
            f"{'':44} {'calls':>7} {'ms/step':>8} {'total s':>9} {'share':>6}",
        ]
        for name, sums in _dearest(outer):
            lines.append(self._line(name, sums, whole))
            if name == EXECUTE:
                lines += [self._line(f"  {inside}", found, whole) for inside, found in _dearest(inner)]
        return "\n".join(lines)

    def close(self) -> None:
        """Logs the table and writes the trace."""
        self._add(self.take(), 0)
        if self._is_logged and self._num_steps:
            logger.info("%s", self.table())
        path, self._trace = self._trace, None
        if path is None:
            return
        try:
            with path.open("w", encoding="utf-8") as file:
                json.dump({"traceEvents": list(self._trace_events()), "displayTimeUnit": "ms"}, file)
        except OSError as error:  # A full disk is no reason for the engine to end otherwise than in order.
            logger.error("The trace can't be written to %s: %s.", path, error)
        else:
            logger.info("The trace of %d spans is in %s: open it at ui.perfetto.dev.", len(self._events), path)

    def _add(self, spans: Iterable[Span], thread: int) -> None:
        for name, start, duration in spans:
            count, total = self._sums[thread].get(name, (0, 0))
            self._sums[thread][name] = count + 1, total + duration
            if self._trace is not None and len(self._events) < MAX_TRACE_EVENTS:
                self._events.append((name, start, duration, thread))

    def _line(self, name: str, sums: tuple[int, int], whole: int) -> str:
        count, total = sums
        per_step = total / 1e6 / max(1, self._num_steps)
        return f"{name:44} {count:7} {per_step:8.3f} {total / 1e9:9.3f} {total / whole:6.1%}"

    def _trace_events(self) -> Iterator[dict[str, Any]]:
        for thread, name in enumerate(("scheduling and clients", "worker")):
            yield {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
        for name, start, duration, thread in self._events:
            yield {"name": name, "ph": "X", "ts": start / 1000, "dur": duration / 1000, "pid": 1, "tid": thread}


def _dearest(sums: dict[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    return sorted(sums.items(), key=lambda entry: -entry[1][1])
