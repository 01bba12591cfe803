"""The comparison with other engines in its short form, of which only cacheflow is there. Nothing that it measures is judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from programs import ROOT


def compare(folder: Path, demo_model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "compare.py", "--short", "--models", folder, *arguments]
    environment = {**os.environ, "CACHEFLOW_CACHE": str(demo_model.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_the_short_form_measures_what_is_there_once_and_draws_it(demo_model: Path, tmp_path: Path) -> None:
    systems = ("--system", "cacheflow", "--system", "transformers", "--python", f"transformers={tmp_path / 'none'}")
    output = tmp_path / "lines.jsonl"
    done = compare(tmp_path, demo_model, *systems, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "transformers: not measured" in done.stdout
    assert "| W1 (output) | cacheflow |" in done.stdout
    assert "| 50 | cacheflow (1) |" in done.stdout
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["workload"], line["system"], line["num_requests"]) for line in lines] == [
        ("w1", "cacheflow", 8),
        ("w7", "cacheflow", 8),
    ]
    assert lines[0]["num_output_tokens"] > 0 < lines[0]["roofline_s"]
    assert lines[1]["num_failed"] == 0
    assert {"commit", "versions", "hardware", "limits"} <= set(lines[0])

    again = compare(tmp_path, demo_model, *systems, "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert again.stdout.partition("| workload")[2] == done.stdout.partition("| workload")[2]
    assert len(output.read_text().splitlines()) == 2
    shutil.rmtree(tmp_path / "demo")  # hundreds of megabytes, which pytest would keep

    drawing = [sys.executable, ROOT / "benchmarks" / "plots.py", output, "--folder", tmp_path / "images"]
    subprocess.run(drawing, check=True, timeout=60)
    for name in ("throughput.svg", "serving.svg"):
        assert "prefers-color-scheme: dark" in (tmp_path / "images" / name).read_text()
