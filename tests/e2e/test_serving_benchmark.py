"""The serving benchmark in its short form, against both frontends with a tiny model. Nothing that it measures is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import DEADLINE_S, ROOT, Program

MODEL = ("--model", "facebook/opt-125m", "--dtype", "float32", "--kv-cache-memory", "0.05", "--disable-log-stats")


@pytest.mark.parametrize(("frontend", "api"), [("simple", "generate"), ("openai", "openai")])
def test_the_short_form_writes_a_line_with_every_quantity_and_a_picture(
    tmp_path: Path, hub_cache: Path, frontend: str, api: str
) -> None:
    lines = tmp_path / "serving.jsonl"
    server = Program(tmp_path / "log", hub_cache, "serve", frontend, *MODEL, "--port", "0")
    try:
        arguments = ("--url", server.wait_for_url(), "--api", api, "--short", "--vocab-size", "301", "--output", str(lines))
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "serving.py", *arguments], capture_output=True, text=True, timeout=DEADLINE_S
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    (run,) = map(json.loads, lines.read_text().splitlines())
    assert (run["benchmark"], run["num_requests"], run["num_failed"], run["api"]) == ("serving", 8, 0, api)
    for quantity in ("ttft_s", "tpot_s", "e2e_s"):
        assert 0 <= run[quantity]["p50"] <= run[quantity]["p90"] <= run[quantity]["p99"]
        assert run[quantity]["num_samples"] == 8
    assert run["output_tokens_per_s"] * run["elapsed_s"] == pytest.approx(64)
    assert {"commit", "versions", "hardware"} <= set(run)
    assert lines.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
