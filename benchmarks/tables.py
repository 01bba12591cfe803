"""The lines of `compare.py` as figures and tables: medians, ranges, ratios. It runs nothing and knows no system."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

OURS = "cacheflow"
COUNTS = {"w3": "num_prompt_tokens"}
"""What a workload's rate counts, where that is not output tokens."""
RIVALS = {"llama-cpp-q4": "cacheflow-int4"}
"""Which of ours a system is held against, where that is not plain cacheflow."""
LATENCIES = (("ttft_s", "p50"), ("ttft_s", "p99"), ("itl_s", "p50"), ("itl_s", "p99"))


@dataclass(frozen=True)
class Figure:
    """Several runs of the same."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def greatest(self) -> float:
        """The largest."""
        return max(self.values)

    def over(self, other: Figure) -> Figure:
        """The least, middle and greatest ratio that these runs and the other's allow."""
        return Figure((self.least / other.greatest, self.median / other.median, self.greatest / other.least))


def read(path: Path) -> list[Line]:
    """What `compare.py` wrote there; nothing if there is no such file."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return [line for line in lines if line["benchmark"] == "peers"]


def rate(line: Line) -> float:
    """Tokens per second of one run."""
    count: int = line[COUNTS.get(line["workload"], "num_output_tokens")]
    return count / float(line["elapsed_s"])


def rates(lines: Iterable[Line]) -> dict[tuple[str, str], Figure]:
    """Tokens per second by workload and system, in the order of the lines; W7, which has a rate of its own, apart."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line["workload"] != "w7":
            found.setdefault((line["workload"], line["system"]), []).append(rate(line))
    return {key: Figure(tuple(values)) for key, values in sorted(found.items(), key=lambda entry: entry[0][0])}


def shares(lines: Iterable[Line]) -> dict[tuple[str, str], float]:
    """Median share of the roofline by workload and system."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line["workload"] != "w7":
            found.setdefault((line["workload"], line["system"]), []).append(line["roofline_s"] / line["elapsed_s"])
    return {key: statistics.median(values) for key, values in found.items()}


def latencies(lines: Iterable[Line]) -> dict[tuple[float, str], list[Figure]]:
    """Of W7 by rate and system: each of `LATENCIES` in seconds, over the seeds."""
    found: dict[tuple[float, str], list[Line]] = {}
    for line in lines:
        if line["workload"] == "w7":
            found.setdefault((line["rate"], line["system"]), []).append(line)
    return {
        key: [Figure(tuple(line[name][percent] for line in of_key)) for name, percent in LATENCIES]
        for key, of_key in sorted(found.items())
    }


def table(lines: list[Line]) -> str:
    """Throughput with the ratio to each system and the share of the roofline, then latencies under Poisson arrivals."""
    return "\n\n".join(part for part in (_throughput(lines), _serving(lines)) if part)


def _throughput(lines: list[Line]) -> str:
    all_rates, all_shares = rates(lines), shares(lines)
    if not all_rates:
        return ""
    part = {(line["workload"], line["system"]): line["num_requests"] for line in lines if "num_requests" in line}
    rows = [
        "| workload | system | tokens/s | range (runs) | cacheflow is faster by | of the bfloat16 roofline |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (name, system), figure in all_rates.items():
        rival = RIVALS.get(system, OURS)
        ours = all_rates.get((name, rival))
        ratio = ""
        if ours and not system.startswith(OURS):
            ratio = f"{ours.median / figure.median:.2f}x" + ("" if rival == OURS else f" ({rival.removeprefix(OURS + '-')})")
        elif ours and system != OURS:
            ratio = f"is itself faster by {figure.median / ours.median:.2f}x"
        count, whole = part.get((name, system)), part.get((name, OURS))
        which = f", first {count} requests" if count and whole and count < whole else ""
        spread = f"{figure.least:.1f} to {figure.greatest:.1f} ({len(figure.values)})"
        unit = "prompt" if name in COUNTS else "output"
        rows.append(
            f"| {name.upper()} ({unit}) | {system}{which} | {figure.median:.1f} | {spread} | {ratio} "
            f"| {all_shares[name, system]:.0%} |"
        )
    return "\n".join(rows)


def _serving(lines: list[Line]) -> str:
    figures = latencies(lines)
    if not figures:
        return ""
    names = [f"{name.removesuffix('_s').upper()} {percent}, ms" for name, percent in LATENCIES]
    rows = [f"| W7, requests/s | system (runs) | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for (per_s, system), of_system in figures.items():
        cells = [f"{1000 * f.median:.1f} ({1000 * f.least:.1f} to {1000 * f.greatest:.1f})" for f in of_system]
        rows.append(f"| {per_s:g} | {system} ({len(of_system[0].values)}) | {' | '.join(cells)} |")
        ours = figures.get((per_s, OURS))
        if ours and system != OURS:
            cells = [f"{f.median / other.median:.2f}x" for f, other in zip(ours, of_system, strict=True)]
            rows.append(f"| {per_s:g} | cacheflow's as a share of {system}'s | {' | '.join(cells)} |")
    return "\n".join(rows)
