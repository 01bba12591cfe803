"""The OpenAI-compatible frontend, driven by other people's clients, each in an environment of its own (`.ci/clients`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import DEADLINE_S, ROOT, Program

KEY = "sk-of-this-test"
CLIENTS = Path(__file__).parent / "clients"
GREETING = "Hello there 😀, how are you?"


def serve(folder: Path, model: Path, *options: str) -> Program:
    arguments = ("serve", "openai", "--model", str(model), "--served-model-name", "scripted", "--port", "0")
    small = ("--dtype", "float32", "--kv-cache-memory", "0.1", "--disable-log-stats")
    return Program(folder / "log", folder, *arguments, *small, *options, CACHEFLOW_API_KEY=KEY)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, scripted_llama: Path) -> Iterator[str]:
    """Where the scripted model is served; it takes requests with `KEY` only."""
    program = serve(tmp_path_factory.mktemp("server"), scripted_llama)
    try:
        yield program.wait_for_url()
    finally:
        program.stop()


def client_file(client: str, name: str) -> Path:
    path = ROOT / ".venvs" / client / name
    assert path.exists(), f"{path} is missing: run .ci/clients, which needs the network once."
    return path


def run(*command: str | Path, folder: Path | None = None, timeout_s: float = 2 * DEADLINE_S, **variables: str) -> str:
    """What a client prints. It may use nothing of this user's, and no network."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=folder)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("client", "script"),
    [
        ("openai-current", "openai_current.py"),
        ("openai-0.28", "openai_legacy.py"),
        ("langchain", "langchain_client.py"),
        ("litellm", "litellm_client.py"),
    ],
)
def test_a_python_client_is_served(url: str, tmp_path: Path, client: str, script: str) -> None:
    variables = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(tmp_path)}
    run(client_file(client, "bin/python"), CLIENTS / script, f"{url}/v1", KEY, **variables)


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm, which .ci/clients installs the client with")
def test_the_node_client_is_served(url: str) -> None:
    folder = client_file("openai-node", "node_modules").parent
    run("node", CLIENTS / "openai_node.mjs", folder, f"{url}/v1", KEY)


def test_the_llm_command_is_served(url: str, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: scripted\n  api_base: {url}/v1\n  api_key_name: mine\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"mine": KEY}))
    llm = client_file("llm", "bin/llm")
    for stream in ([], ["--no-stream"]):
        printed = run(
            llm, "-m", "mine", *stream, "-o", "temperature", "0", "Hi", LLM_USER_PATH=str(tmp_path), HOME=str(tmp_path)
        )
        assert printed.strip() == GREETING


def test_lm_eval_scores_a_local_task(url: str, scripted_llama: Path, tmp_path: Path) -> None:
    """The model is sure of what follows "Let me"; so each question has one right answer, and greedy text is that answer."""
    questions = [
        {"question": "Let me", "choices": [" look.", " there"], "answer": 0},
        {"question": "It is", "choices": [" you", " sunny"], "answer": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/questions.jsonl\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{data}output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        'doc_to_target: answer\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    (tmp_path / "write.yaml").write_text(
        f"task: write\n{data}output_type: generate_until\ndoc_to_text: question\n"
        'doc_to_target: "{{choices[answer]}}"\ntarget_delimiter: ""\n'
        'generation_kwargs:\n  until: ["\\n", " in"]\n  max_gen_toks: 8\n  temperature: 0\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    arguments = (
        f"model=scripted,base_url={url}/v1/completions,tokenizer={scripted_llama},tokenizer_backend=huggingface,max_length=256"
    )
    run(
        client_file("lm-eval", "bin/lm_eval"), "--model", "local-completions", "--model_args", arguments,
        "--tasks", "choose,write", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--batch_size", "2",
        folder=tmp_path, HOME=str(tmp_path), OPENAI_API_KEY=KEY, HF_HOME=str(tmp_path / "hub"), HF_DATASETS_OFFLINE="1",
    )  # fmt: skip
    [results] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    assert scores["choose"]["acc,none"] == 1.0
    assert scores["write"]["exact_match,none"] == 1.0


def test_schemathesis_finds_no_status_that_is_not_documented(scripted_llama: Path, tmp_path: Path) -> None:
    program = serve(tmp_path, scripted_llama, "--max-model-len", "64")
    try:
        url = program.wait_for_url()
        request = urllib.request.Request(f"{url}/openapi.json", headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            (tmp_path / "openapi.json").write_bytes(answer.read())
        run(
            client_file("schemathesis", "bin/schemathesis"), "run", tmp_path / "openapi.json", "--url", url,
            "--header", f"Authorization: Bearer {KEY}", "--phases", "coverage,fuzzing", "--max-examples", "25", "--seed", "1",
            "--generation-deterministic", "--mode", "all", "--workers", "1", "--request-timeout", "180",
            "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
            folder=tmp_path, HOME=str(tmp_path),
        )  # fmt: skip
    finally:
        program.stop()


def test_a_server_bears_ten_seconds_of_load(url: str, tmp_path: Path) -> None:
    """Only errors are looked for: how evenly tokens flow is judged in two minutes on a machine that does nothing else."""
    arguments = ("--url", url, "--api-key", KEY, "--duration", "8", "--clients", "4", "--no-limit", "--vocab-size", "260")
    output = tmp_path / "load.jsonl"
    run(sys.executable, ROOT / "benchmarks" / "load.py", *arguments, "--output-tokens", "16", "--output", str(output))
    measured = json.loads(output.read_text())
    assert measured["num_failed"] == 0
    assert measured["num_requests"] > 0
    assert measured["rate"] == pytest.approx(0.9 * measured["capacity_per_s"])
