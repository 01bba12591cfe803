"""What the comparison's lines become: rates, ratios, latencies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

from installed import installed
from tables import latencies, rates, table


def line(workload: str, system: str, elapsed_s: float, round_number: int = 0, **fields: Any) -> dict[str, Any]:
    counts = {"num_prompt_tokens": 1000, "num_output_tokens": 100, "num_requests": 8, "roofline_s": 1.0}
    return {"workload": workload, "system": system, "round": round_number, "elapsed_s": elapsed_s, **counts, **fields}


def test_a_ratio_is_of_medians_and_its_range_is_all_that_the_runs_allow() -> None:
    lines = [line("w1", "cacheflow", seconds) for seconds in (1.0, 2.0, 4.0)] + [
        line("w1", "vllm", 5.0),
        line("w1", "vllm", 10.0),
    ]
    figures = rates(lines)
    ratio = figures["w1", "cacheflow"].over(figures["w1", "vllm"])
    assert (ratio.least, ratio.median, ratio.greatest) == pytest.approx((25 / 20, 50 / 15, 100 / 10))
    assert "| W1 (output) | vllm | 15.0 | 10.0 to 20.0 (2) | 3.33x | 15% |" in table(lines)


def test_prefill_counts_prompt_tokens() -> None:
    assert rates([line("w3", "cacheflow", 2.0)])["w3", "cacheflow"].median == 500


def test_four_bits_are_held_against_four_bits() -> None:
    lines = [line("w2", "cacheflow", 4.0), line("w2", "cacheflow-int4", 1.0), line("w2", "llama-cpp-q4", 3.0)]
    assert "| llama-cpp-q4 | 33.3 | 33.3 to 33.3 (1) | 3.00x (int4) |" in table(lines)
    assert "| cacheflow-int4 | 100.0 | 100.0 to 100.0 (1) | is itself faster by 4.00x |" in table(lines)


def test_a_system_that_ran_fewer_requests_says_so() -> None:
    lines = [line("w1", "cacheflow", 1.0), line("w1", "transformers", 2.0, num_requests=4)]
    assert "| transformers, first 4 requests | 50.0 |" in table(lines)


def test_latencies_are_medians_over_the_seeds_of_a_rate() -> None:
    lines = [
        {
            "workload": "w7", "system": system, "rate": 1.03, "seed": seed,
            "ttft_s": {"p50": factor * (seed + 1), "p99": 4.0}, "itl_s": {"p50": 0.01, "p99": 0.02},
        }
        for system, factor in (("cacheflow", 0.01), ("vllm", 0.02))
        for seed in range(3)
    ]  # fmt: skip
    assert latencies(lines)[1.03, "vllm"][0].median == pytest.approx(0.04)
    assert "| 1.03 | cacheflow's as a share of vllm's | 0.50x | 1.00x | 1.00x | 1.00x |" in table(lines)


def test_distributions_that_another_needs_are_counted_once_and_extras_where_they_are_asked_for() -> None:
    plain, plain_mb = installed(["pytest", "pluggy"])
    with_engine, with_engine_mb = installed(["pytest", "cacheflow-engine"])
    assert installed(["pytest"])[0] == plain
    assert with_engine > plain > 1
    assert with_engine_mb > plain_mb > 0
    assert installed(["cacheflow-engine[structured]"])[0] > installed(["cacheflow-engine"])[0]
