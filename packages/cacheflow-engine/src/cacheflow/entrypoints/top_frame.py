"""One frame of `cacheflow top`: readings of an engine as text for a terminal. It knows no network and no keyboard."""

from __future__ import annotations

import string
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cacheflow.types import BLOCK_CACHED, BLOCK_FREE, BLOCK_OWNED, BLOCK_SHARED

KINDS = {
    BLOCK_FREE: ("free", "#3a3f47", "."),
    BLOCK_CACHED: ("cached", "#8a919c", "-"),
    BLOCK_SHARED: ("shared", "#f1f2f4", "+"),
}
"""Name, colour, and the character that stands for it where there are no colours."""
HUES = (
    # Told apart with every common colour blindness (Okabe and Ito, 2008), and then the same once more, lighter.
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"),
    *("#66aad1", "#f3c566", "#66c5ab", "#e0afca", "#aadaf4", "#e69e66", "#f6ef8e"),
)
LETTERS = string.ascii_letters
"""For requests, where there are no colours."""
BARS = "▁▂▃▄▅▆▇█"
NUM_RATES = 32
MAX_MAP_ROWS = 24
ROWS_BESIDE_MAP = 12
"""Of a frame: what stands above the map, its legend, and the table's heading."""
MIN_TABLE_ROWS = 3
UPPER_HALF = "▀"
SQUARE = "■"


@dataclass(frozen=True)
class Reading:
    """What a server says of itself.

    Attributes:
        model: The served model.
        stats: The fields of `EngineStats`.
        latency: The summary of the last minute: percentiles by name, or None where there was nothing.
        requests: The fields of each `RequestSummary`, running ones first.
        blocks: A kind per KV block.
        at_s: When it was taken, on the monotonic clock.
    """

    model: str
    stats: dict[str, Any]
    latency: dict[str, Any]
    requests: list[dict[str, Any]]
    blocks: list[int]
    at_s: float


class History:
    """The newest reading, the rates between the ones before, and a colour for each request as long as it is there."""

    def __init__(self) -> None:
        self.newest: Reading | None = None
        self.rates: deque[float] = deque(maxlen=NUM_RATES)
        self._colours: dict[tuple[str, str], int] = {}

    def add(self, reading: Reading) -> None:
        """Takes a reading in."""
        before, self.newest = self.newest, reading
        if before is not None:
            num_tokens = reading.stats["num_generated_tokens"] - before.stats["num_generated_tokens"]
            # An engine that was started again counts from zero.
            self.rates.append(max(num_tokens, 0) / max(reading.at_s - before.at_s, 1e-3))
        keys = [_key(request) for request in reading.requests]
        self._colours = {key: self._colours[key] for key in keys if key in self._colours}
        for key in keys:
            if key not in self._colours:
                used = set(self._colours.values())
                self._colours[key] = next(i for i in range(len(used) + 1) if i not in used)

    def colour(self, request: dict[str, Any]) -> str:
        """Of a request of the newest reading."""
        return HUES[self._colours[_key(request)] % len(HUES)]

    def letter(self, request: dict[str, Any]) -> str:
        """Of a request of the newest reading."""
        return LETTERS[self._colours[_key(request)] % len(LETTERS)]


def frame(
    history: History, url: str, width: int, height: int | None, problem: str | None = None, has_colours: bool = True
) -> RenderableType:
    """The newest reading as text.

    Args:
        history: With at least one reading, unless there is a problem.
        url: Of the server.
        width: Columns of the terminal.
        height: Rows of the terminal; None: as many as it takes.
        problem: Why there is no newer reading, or None.
        has_colours: Whether the terminal has; without them blocks are characters.
    """
    reading = history.newest
    if reading is None:
        return Text(printable(problem or ""), style="bold red")
    num_rows = MAX_MAP_ROWS if height is None else max(1, min(MAX_MAP_ROWS, height - ROWS_BESIDE_MAP - MIN_TABLE_ROWS))
    lines_per_row = 2 if has_colours else 1
    shown, per_cell = _cells(reading.blocks, width, lines_per_row * num_rows)
    num_map_rows = -(-len(shown) // (lines_per_row * width))
    num_requests = None if height is None else max(0, height - ROWS_BESIDE_MAP - num_map_rows)
    return Group(
        _title(reading, url, problem or ("" if height is None else "press q to end"), "bold red" if problem else "dim"),
        Text(),
        _numbers(reading, history),
        Text(),
        _coloured_map(shown, reading, history, width) if has_colours else _plain_map(shown, reading, history, width),
        _legend(reading, per_cell, has_colours),
        Text(),
        _requests(reading, history, num_requests, has_colours),
    )


def printable(text: str) -> str:
    """What a server or its clients named, without what could steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _key(request: dict[str, Any]) -> tuple[str, str]:
    return request["client_id"], request["request_id"]


def _title(reading: Reading, url: str, note: str, style: str) -> Text:
    title = Text.assemble(
        ("cacheflow", "bold"), "  ", (printable(note), style), "  ", printable(reading.model), "  ", (url, "dim")
    )
    title.no_wrap, title.overflow = True, "ellipsis"
    return title


def _numbers(reading: Reading, history: History) -> Table:
    stats, latency = reading.stats, reading.latency
    num_held = stats["num_blocks"] - stats["num_free_blocks"] - stats["num_cached_blocks"]
    rate = history.rates[-1] if history.rates else latency["output_tokens_per_s"]
    hits = f"{stats['num_cached_tokens'] / stats['num_prompt_tokens']:.0%}" if stats["num_prompt_tokens"] else "–"
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(4):
        table.add_column(no_wrap=True)
    rows = (
        (("tokens/s", f"{rate:.1f} {_sparkline(history.rates)}"), ("running", stats["num_running"]),
         ("TTFT", _latency(latency["ttft_s"])), ("blocks in use", f"{num_held / max(stats['num_blocks'], 1):.0%}")),
        (("generated", f"{stats['num_generated_tokens']:,}"), ("waiting", stats["num_waiting"]),
         ("ITL", _latency(latency["itl_s"])), ("cache hits", hits)),
        (("prompt", f"{stats['num_prompt_tokens']:,}"), ("preempted", stats["num_preemptions"]),
         ("E2E", _latency(latency["e2e_s"])), ("steps", f"{stats['num_steps']:,}")),
    )  # fmt: skip
    for row in rows:
        table.add_row(*(Text.assemble((f"{name} ", "dim"), (str(value), "bold")) for name, value in row))
    return table


def _latency(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "–"
    return f"{_seconds(percentiles['p50'])} (p90 {_seconds(percentiles['p90'])})"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.{1 if value < 0.01 else 0}f} ms"


def _sparkline(values: deque[float]) -> str:
    highest = max(values, default=0) or 1
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * value / highest))] for value in values)


def _cells(blocks: list[int], width: int, max_lines: int) -> tuple[list[int], int]:
    """The blocks with as many of them in a cell as it takes to fit; a cell shows what most of its blocks are."""
    per_cell = max(1, -(-len(blocks) // (width * max_lines)))
    if per_cell == 1:
        return blocks, 1
    groups = (blocks[start : start + per_cell] for start in range(0, len(blocks), per_cell))
    return [Counter(group).most_common(1)[0][0] for group in groups], per_cell


def _coloured_map(cells: list[int], reading: Reading, history: History, width: int) -> Segments:
    """Two lines of cells in a row of characters: the upper one in the foreground's colour, the lower in the background's."""
    colours = {kind: colour for kind, (_, colour, _) in KINDS.items()}
    colours |= {BLOCK_OWNED + index: history.colour(request) for index, request in enumerate(reading.requests)}
    segments = []
    for start in range(0, len(cells), 2 * width):
        upper, lower = cells[start : start + width], cells[start + width : start + 2 * width]
        for column, kind in enumerate(upper):
            below = colours[lower[column]] if column < len(lower) else None
            segments.append(Segment(UPPER_HALF, Style(color=colours[kind], bgcolor=below)))
        segments.append(Segment.line())
    return Segments(segments)


def _plain_map(cells: list[int], reading: Reading, history: History, width: int) -> Text:
    letters = {kind: letter for kind, (_, _, letter) in KINDS.items()}
    letters |= {BLOCK_OWNED + index: history.letter(request) for index, request in enumerate(reading.requests)}
    line = "".join(letters[kind] for kind in cells)
    return Text("\n".join(line[start : start + width] for start in range(0, len(line), width)))


def _legend(reading: Reading, per_cell: int, has_colours: bool) -> Text:
    counts = Counter(min(kind, BLOCK_OWNED) for kind in reading.blocks)
    legend = Text()
    for kind, (name, colour, letter) in KINDS.items():
        legend.append(SQUARE if has_colours else letter, colour).append(f" {name} {counts[kind]:,}   ")
    for letter, hue in zip(LETTERS, HUES[:3], strict=False):
        legend.append(SQUARE if has_colours else letter, hue)
    legend.append(f" held {counts[BLOCK_OWNED]:,}   ")
    legend.append(f"{len(reading.blocks):,} blocks" + (f", {per_cell} a cell" if per_cell > 1 else ""), "dim")
    legend.no_wrap, legend.overflow = True, "ellipsis"
    return legend


def _requests(reading: Reading, history: History, max_rows: int | None, has_colours: bool) -> RenderableType:
    if not reading.requests:
        return Text("No requests.", "dim")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("Request", no_wrap=True)
    for name in ("Prompt", "Output", "Seqs", "Blocks", "Age"):
        table.add_column(name, justify="right", no_wrap=True)
    num_blocks = Counter(reading.blocks)
    for index, request in enumerate(reading.requests[:max_rows]):
        num_prompt = request["num_prompt_tokens"]
        computed = min(request["num_computed_tokens"], num_prompt)
        is_running = request["is_running"]
        mark = SQUARE if has_colours else history.letter(request)
        table.add_row(
            Text.assemble((mark, history.colour(request)), " ", printable(request["request_id"][:12])),
            f"{computed}/{num_prompt}" if is_running and computed < num_prompt else str(num_prompt),
            str(request["num_output_tokens"]) if is_running else "waiting",
            str(request["num_sequences"]),
            str(num_blocks[BLOCK_OWNED + index]),
            f"{max(0, time.time() - request['arrival_s']):.0f} s",
            style="" if is_running else "dim",
        )
    return table
