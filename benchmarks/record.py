"""What every benchmark shares: the workloads, and one JSON line per measurement with versions, commit and hardware."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PACKAGES = ("cacheflow-engine", "cacheflow-kernels", "torch", "transformers", "triton", "numpy")


@dataclass(frozen=True)
class Item:
    """One request of a workload: greedy unless the benchmark says otherwise, and it goes on past the end of text."""

    prompt_token_ids: list[int]
    num_output_tokens: int


def workload(name: str) -> list[Item]:
    """A file of `workloads/`: a line a request, `{"id", "prompt": [token ids of SmolLM2], "out": n}`."""
    lines = (FOLDER / "workloads" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Item(entry["prompt"], entry["out"]) for entry in map(json.loads, lines)]


def shortened(items: list[Item]) -> list[Item]:
    """Eight requests with a quarter of their output: enough to see that everything runs."""
    return [Item(item.prompt_token_ids, max(4, item.num_output_tokens // 4)) for item in items[:8]]


def surroundings() -> dict[str, Any]:
    """Versions, commit and hardware: what a figure can't be compared without."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))} | {"python": platform.python_version()},
        "hardware": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "gpu": _gpu()},
    }


def write(path: Path | None, measurement: dict[str, Any]) -> None:
    """Appends one JSON line to the file, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measurement) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The short hash, with "+" behind it when the tree has changes; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=FOLDER, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
