"""Frames of `cacheflow top`, drawn to a recorded console."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cacheflow.entrypoints.top_frame import HUES, UPPER_HALF, History, Reading, frame

URL = "http://localhost:8001"


def reading(blocks: list[int], num_requests: int = 2, num_tokens: int = 100, at_s: float = 0.0) -> Reading:
    stats = {
        "num_running": num_requests,
        "num_waiting": 0,
        "num_blocks": len(blocks),
        "num_free_blocks": blocks.count(0),
        "num_cached_blocks": blocks.count(1),
        "num_preemptions": 3,
        "num_prompt_tokens": 200,
        "num_generated_tokens": num_tokens,
        "num_cached_tokens": 50,
        "num_steps": 7,
    }
    requests = [
        {
            "request_id": f"request-{index}",
            "client_id": "client",
            "is_running": True,
            "num_prompt_tokens": 100,
            "num_computed_tokens": 40,
            "num_output_tokens": 5,
            "num_sequences": 1,
            "arrival_s": 0.0,
        }
        for index in range(num_requests)
    ]
    percentiles = {"p50": 0.25, "p90": 1.5, "p99": 2.0}
    latency = {"ttft_s": percentiles, "itl_s": None, "e2e_s": None, "output_tokens_per_s": 12.0}
    return Reading("a-model", stats, latency, requests, blocks, at_s)


def drawn(history: History, width: int = 80, height: int | None = None, **options: Any) -> str:
    file = io.StringIO()
    has_colours = options.get("has_colours", True)
    console = Console(
        file=file, width=width, height=100, force_terminal=has_colours, color_system="truecolor" if has_colours else None
    )
    console.print(frame(history, URL, width, height, **options))
    return file.getvalue()


def shown(*readings: Reading) -> History:
    history = History()
    for one in readings:
        history.add(one)
    return history


def test_without_colours_each_block_is_a_character() -> None:
    text = drawn(shown(reading([0, 0, 1, 2, 3, 4, 4])), has_colours=False)
    assert "\n..-+abb\n" in text
    assert "free 2" in text
    assert "cached 1" in text
    assert "shared 1" in text
    assert "held 3" in text


def test_two_lines_of_blocks_share_a_row_of_characters() -> None:
    text = drawn(shown(reading([3] * 80 + [4] * 80)))
    assert text.count(UPPER_HALF) == 80


def test_a_request_keeps_its_colour_when_one_before_it_ends() -> None:
    history = shown(reading([3, 4], num_requests=2))
    second = history.newest.requests[1]  # type: ignore[union-attr]
    colour = history.colour(second)
    later = reading([3], num_requests=0)
    history.add(Reading(later.model, later.stats, later.latency, [second], [3], 1.0))
    assert history.colour(second) == colour == HUES[1]


def test_the_rate_is_of_the_time_between_two_readings() -> None:
    history = shown(reading([0], num_tokens=100, at_s=1.0), reading([0], num_tokens=150, at_s=1.5))
    assert list(history.rates) == [100.0]
    assert "tokens/s 100.0" in drawn(history, has_colours=False)


def test_an_engine_that_counts_from_zero_again_has_no_negative_rate() -> None:
    history = shown(reading([0], num_tokens=100, at_s=1.0), reading([0], num_tokens=10, at_s=1.5))
    assert list(history.rates) == [0.0]


@pytest.mark.parametrize("num_blocks", [1, 1638, 100_000])
@pytest.mark.parametrize("size", [(40, 16), (80, 24), (200, 60)])
def test_a_frame_is_no_larger_than_the_terminal(num_blocks: int, size: tuple[int, int]) -> None:
    blocks = [index % 50 // 10 for index in range(num_blocks)]
    text = drawn(shown(reading(blocks, num_requests=100)), *size, has_colours=False)
    assert text.count("\n") <= size[1]
    assert max(len(line) for line in text.splitlines()) <= size[0]


def test_many_blocks_share_a_cell_that_shows_what_most_of_them_are() -> None:
    text = drawn(shown(reading([0] * 30_000 + [1] * 30_000)), 100, 24, has_colours=False)
    assert "a cell" in text
    rows = [line for line in text.splitlines() if line and set(line) <= {".", "-"}]
    assert "".join(rows).lstrip(".").strip("-") == ""


def test_what_clients_name_can_not_steer_the_terminal() -> None:
    one = reading([0], num_requests=1)
    one.requests[0]["request_id"] = "\x1b[2Jevil"
    text = drawn(shown(one), has_colours=False)
    assert "\x1b" not in text
    assert "?[2Jevil" in text


def test_a_problem_stands_where_the_help_was() -> None:
    history = shown(reading([0]))
    assert "press q to end" in drawn(history, 100, 30, has_colours=False)
    assert "No server answers" in drawn(history, 100, 30, problem="No server answers.", has_colours=False)
