"""A third party's model package, from its source to tokens: built, installed into a fresh environment, served by the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tiny import VOCAB_SIZE, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = ["Hello, my name is", "The capital of France is", "1 day"]
NUM_TOKENS = 12


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT / "tests",
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: what others made is linked from this one, ours is installed from wheels."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("environment")
    pip = (sys.executable, "-m", "pip")
    sources = (ROOT / "packages" / "cacheflow-engine", ROOT / "examples" / "plugin-model")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, *sources)
    venv.create(folder, symlinks=True)
    bin_folder = folder / "bin"
    site = Path(run(bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "cacheflow" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    run(*pip, "--python", bin_folder / "python", "install", "-q", "--find-links", wheels, "cacheflow-gpt-neox")
    return bin_folder


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A tiny GPT-NeoX as Hugging Face saves it, and the tokens that Hugging Face generates greedily."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("gpt-neox")
    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=112,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=2,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=VOCAB_SIZE,  # a token that never comes, so that nothing ends early
                pad_token_id=1,
            )
        expected.append(out[0, ids.shape[1] :].tolist())
    return folder, expected


def test_the_new_environment_lists_the_plugin(environment: Path) -> None:
    rows = json.loads(run(environment / "cacheflow", "plugins", "--json"))
    row = next(row for row in rows if row["name"] == "GPTNeoXForCausalLM")
    assert (row["distribution"], row["status"]) == ("cacheflow-gpt-neox", "usable")
    assert {row["distribution"] for row in rows} == {"cacheflow-engine", "cacheflow-gpt-neox"}


def test_the_plugin_passes_the_conformance_suite(environment: Path) -> None:
    out = run(environment / "cacheflow", "plugins", "check", "GPTNeoXForCausalLM")
    assert out.count("passed") == 6
    assert "not applicable" not in out


def test_the_engine_serves_the_plugins_model_as_hugging_face_does(
    environment: Path, twin: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    folder, expected = twin
    output = tmp_path / "out.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    run(
        environment / "cacheflow",
        "generate",
        *("--model", folder, "--input", prompts, "--output", output),
        *("--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--ignore-eos", "--logprobs", "0", "--dtype", "float32"),
        *("--kv-cache-memory", "0.05"),
    )
    lines = sorted((json.loads(line) for line in output.read_text().splitlines()), key=lambda line: line["index"])
    assert [line["outputs"][0]["token_ids"] for line in lines] == expected
