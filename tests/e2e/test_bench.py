"""`cacheflow bench` from the outside, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from programs import DEADLINE_S

from cacheflow.conformance.tiny_model import write_tiny_model


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cacheflow", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_a_bench_prints_a_json_line_a_round_and_appends_it(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path).model
    workload, output = tmp_path / "work.jsonl", tmp_path / "results.jsonl"
    workload.write_text('{"prompt": [1, 2, 3], "out": 4}\n{"prompt": [4, 5], "out": 2}\n')
    model_options = ("--model", model, "--use-dummy-weights", "--dtype", "float32")
    done = bench(*model_options, "--workload", str(workload), "--rounds", "2", "--n", "2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["num_requests"], line["num_prompt_tokens"], line["num_output_tokens"]) for line in lines] == [(2, 5, 12)] * 2
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines


def test_a_workload_that_is_none_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "work.jsonl").write_text('{"prompt": [1]}\n')
    done = bench("--model", "demo", "--workload", str(tmp_path / "work.jsonl"))
    assert done.returncode == 1
    assert 'must be like {"prompt"' in done.stderr
