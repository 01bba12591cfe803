"""The quickstart's offline code, letter by letter, on a tiny random model cached under the real name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = """\
from cacheflow import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)

llm = LLM(model="facebook/opt-125m")

outputs = llm.generate(prompts, sampling_params)

# Print the outputs.
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""
PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is"]


def run_quickstart(hub_cache: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs it as a user does, in a script, offline, with `hub_cache` as the hub's cache."""
    script = folder / "quickstart.py"
    script.write_text(QUICKSTART, encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub_cache.parent), "HF_HUB_CACHE": str(hub_cache)}
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def printed(hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The prompts and texts that the quickstart prints."""
    done = run_quickstart(hub_cache, tmp_path_factory.mktemp("quickstart"))
    assert done.returncode == 0, done.stderr
    pairs = []
    for line in done.stdout.splitlines():
        prompt, text = line.removeprefix("Prompt: ").split(", Generated text: ")
        pairs.append((ast.literal_eval(prompt), ast.literal_eval(text)))
    return pairs


def test_the_quickstart_prints_its_prompts_in_their_order(printed):
    assert [prompt for prompt, _ in printed] == PROMPTS


def test_the_quickstart_prints_a_text_for_every_prompt(printed):
    assert all(text for _, text in printed)


def test_without_the_model_the_quickstart_s_error_names_the_demo(tmp_path):
    done = run_quickstart(tmp_path / "empty-cache", tmp_path)
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("cacheflow.errors.ModelNotFoundError: ")
    assert "facebook/opt-125m" in last_line
    assert "--model demo" in last_line
    assert done.stdout == ""
