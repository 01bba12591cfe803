"""The `cacheflow` command as a user runs it: a process, a tiny model, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from programs import DEADLINE_S

COMMAND = (sys.executable, "-m", "cacheflow")
SMALL = ("--kv-cache-memory", "0.05", "--temperature", "0")


def cacheflow(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *(str(a) for a in arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def generate(model: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return cacheflow("generate", "--model", model, *SMALL, *arguments)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def texts_of(path: Path) -> dict[int, str]:
    return {line["index"]: line["outputs"][0]["text"] for line in lines_of(path)}


def write_lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return path


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from cacheflow.cli import cacheflow; cacheflow(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "generate" in out
    assert "plugins" in out
    assert not {"torch", "transformers", "numpy", "zmq"} & set(out.split())


@pytest.mark.parametrize("command", ["generate", "engine", "plugins", "serve"])
def test_every_subcommand_explains_itself(command: str) -> None:
    result = cacheflow(command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: cacheflow {command}")


def test_prompts_on_the_command_line_are_printed_with_their_texts_and_the_throughput(tiny_llama: Path) -> None:
    result = generate(tiny_llama, "Hello, my name is", "The capital of France is", "--max-tokens", "5", "--ignore-eos")
    assert result.returncode == 0, result.stderr
    first, second, throughput = result.stdout.splitlines()
    assert first.startswith("Prompt: 'Hello, my name is', Generated text: ")
    assert second.startswith("Prompt: 'The capital of France is', Generated text: ")
    assert throughput.startswith("Throughput: 2 requests, ")
    assert ", 10 output tokens in " in throughput


def test_a_bad_prompt_is_reported_and_the_others_are_kept(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "Hello", "id": "first", "max_tokens": 3, "ignore_eos": True},
        {"prompt": "too long " * 600},
        "{this is not JSON",
        {"prompt": "Hello", "temperature": 1000},
        {"prompt": "The other thing", "n": 2, "temperature": 1.0, "sampling_params": {"max_tokens": 4, "ignore_eos": True}},
    )
    output = tmp_path / "out.jsonl"
    result = generate(tiny_llama, "--input", prompts, "--output", output)
    assert result.returncode == 1
    by_index = {line["index"]: line for line in lines_of(output)}
    assert by_index.keys() == {0, 1, 2, 3, 4}
    assert by_index[0]["id"] == "first"
    assert by_index[0]["outputs"][0].keys() >= {"text", "finish_reason", "num_tokens", "cumulative_logprob"}
    assert by_index[0]["outputs"][0]["num_tokens"] == 3
    assert [c["num_tokens"] for c in by_index[4]["outputs"]] == [4, 4]
    for index, complaint in ((1, "512"), (2, "not JSON"), (3, "temperature must be")):
        assert by_index[index]["outputs"] == []
        assert complaint in by_index[index]["error"]
        assert f"Error: prompt {index} " in result.stderr
    assert "Throughput: 2 requests" in result.stdout


def test_a_second_run_does_what_is_missing_after_a_torn_last_line(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "in.txt", "Hello", "The president", "San Francisco is", "1 day")
    output = tmp_path / "out.jsonl"
    arguments = ("--input", prompts, "--output", output, "--max-tokens", "6", "--ignore-eos")
    assert generate(tiny_llama, *arguments).returncode == 0
    texts = texts_of(output)
    first, second, third, _ = output.read_text().split("\n", 3)
    kept = f"{first}\n{second}\n"
    output.write_text(kept + third[: len(third) // 2])
    result = generate(tiny_llama, *arguments)
    assert result.returncode == 0, result.stderr
    assert "2 of 4 requests are already in" in result.stdout
    assert output.read_text().startswith(kept)
    assert len(lines_of(output)) == 4
    assert texts_of(output) == texts
    again = generate(tiny_llama, *arguments)
    assert again.returncode == 0
    assert "4 of 4 requests are already in" in again.stdout


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process_behind(tiny_llama: Path, tmp_path: Path) -> None:
    short = [{"prompt": f"number {i}", "max_tokens": 3, "ignore_eos": True} for i in range(3)]
    long = [{"prompt": f"story {i}", "max_tokens": 450, "ignore_eos": True} for i in range(300)]
    prompts = write_lines(tmp_path / "in.jsonl", *short, *long)
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [*COMMAND, "generate", "--model", tiny_llama, *SMALL, "--max-num-seqs", "4", "--input", prompts, "--output", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end_s = time.monotonic() + DEADLINE_S
        while not (output.exists() and output.read_text().count("\n") >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end_s, "nothing finished"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 130, err
    lines = lines_of(output)
    assert 3 <= len(lines) < 300
    assert f"Interrupted: {len(lines)} of 303 requests had finished" in err
    assert "Traceback" not in err
    assert f"Throughput: {len(lines)} requests" in out
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_an_error_of_ours_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = cacheflow("generate", "--model", tmp_path / "nothing-here", "Hello")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.stderr


def test_plugins_lists_every_group() -> None:
    rows = json.loads(cacheflow("plugins", "--json").stdout)
    assert {row["group"] for row in rows} >= {"cacheflow.models", "cacheflow.frontends", "cacheflow.executors"}
    llama = next(row for row in rows if row["name"] == "LlamaForCausalLM")
    assert llama["distribution"] == "cacheflow-engine"
    assert llama["status"] == "usable"
    assert llama["reason"] == ""
    table = cacheflow("plugins").stdout
    assert all(row["name"] in table and row["reason"] in table for row in rows)


def install(site: Path, distribution: str, group: str, entry: str, **files: str) -> None:
    """Puts a distribution with one entry point on an import path."""
    metadata = site / f"{distribution}-1.5.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    for name, text in files.items():
        (site / f"{name}.py").write_text(text)


def test_plugins_says_why_one_cannot_be_used(tmp_path: Path) -> None:
    old = "class Old:\n    CONTRACT_VERSION = 0\n"
    refuses = (
        "class No:\n    CONTRACT_VERSION = 1\n"
        "    @classmethod\n    def supports(cls, spec):\n        return ('there is no such device',)\n"
    )
    install(tmp_path, "one", "cacheflow.schedulers", "twice = one:A", one="class A: ...")
    install(tmp_path, "two", "cacheflow.schedulers", "twice = two:B", two="class B: ...")
    install(tmp_path, "old", "cacheflow.models", "Old = old:Old", old=old)
    install(tmp_path, "absent", "cacheflow.models", "Absent = nowhere:Absent")
    install(tmp_path, "refuses", "cacheflow.attention_backends", "refuses = refuses:No", refuses=refuses)
    result = cacheflow("plugins", "--json", PYTHONPATH=str(tmp_path))
    rows = {(row["name"], row["distribution"]): row for row in json.loads(result.stdout)}
    for owner in ("one", "two"):
        row = rows["twice", owner]
        assert row["status"] == "conflict"
        assert "one" in row["reason"]
        assert "two" in row["reason"]
    assert rows["Old", "old"]["status"] == "broken"
    assert "contract version 0" in rows["Old", "old"]["reason"]
    assert rows["Absent", "absent"]["status"] == "broken"
    assert "nowhere" in rows["Absent", "absent"]["reason"]
    assert rows["refuses", "refuses"]["status"] == "unavailable"
    assert rows["refuses", "refuses"]["reason"] == "there is no such device"
    assert rows["refuses", "refuses"]["version"] == "1.5"


def test_plugins_check_prints_each_check_and_fails_when_one_fails(tmp_path: Path) -> None:
    bad = (
        "class Bad:\n    CONTRACT_VERSION = 1\n"
        "    def key(self, v): return v.arrival_index\n    victim_key = key\n    def chunk(self, v, b): return 0\n"
    )
    install(tmp_path, "bad", "cacheflow.schedulers", "bad = bad:Bad", bad=bad)
    good = cacheflow("plugins", "check", "fcfs")
    assert good.returncode == 0
    assert good.stdout.count("passed") == 4
    result = cacheflow("plugins", "check", "bad", "--group", "schedulers", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "failed          chunk_is_within_the_budget: bad.chunk must be from 1 to the budget 1, got 0" in result.stdout
    unknown = cacheflow("plugins", "check", "nothing")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("Error: No plugin 'nothing' in any group.")


def test_commands_of_other_packages_are_listed_without_being_imported_and_run(tmp_path: Path) -> None:
    hello = "import click\nprint('imported')\n@click.command()\ndef hello():\n    'Greet.'\n    click.echo('hello')\n"
    install(tmp_path, "greeter", "cacheflow.commands", "hello = greeting:hello", greeting=hello)
    out = cacheflow("--help", PYTHONPATH=str(tmp_path)).stdout
    assert "hello" in out
    assert "greeter 1.5" in out
    assert "imported" not in out
    assert cacheflow("hello", PYTHONPATH=str(tmp_path)).stdout == "imported\nhello\n"


def test_serving_a_frontend_that_does_not_exist_names_those_that_are_installed() -> None:
    result = cacheflow("serve", "nothing")
    assert result.returncode == 2
    assert "There is no frontend 'nothing'. Installed: openai, simple." in result.stderr


def test_other_libraries_information_stays_out_of_the_log(tiny_llama: Path) -> None:
    program = (
        "import logging; from cacheflow.cli import main; from cacheflow import llm\n"
        "real = llm.LLM\n"
        "def load(**options):\n    logging.getLogger('torch').info('of torch')\n    return real(**options)\n"
        "llm.LLM = load\n"
        f"main(['generate', '--model', {str(tiny_llama)!r}, *{SMALL!r}, 'Hello'])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert result.returncode == 0
    assert "of torch" not in result.stderr
    assert "INFO cacheflow." in result.stderr


def test_a_resumed_run_draws_what_an_unbroken_one_draws_and_takes_no_texts_of_other_parameters(
    tiny_llama: Path, tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path / "in.txt", *["Hello"] * 4)
    output = tmp_path / "out.jsonl"
    arguments = ("--input", prompts, "--output", output, "--temperature", "1", "--ignore-eos")
    assert generate(tiny_llama, *arguments, "--max-tokens", "6").returncode == 0
    texts = texts_of(output)
    assert len(set(texts.values())) > 1
    kept = [line for line in output.read_text().splitlines(keepends=True) if json.loads(line)["index"] in (0, 2)]
    output.write_text("".join(kept))
    assert generate(tiny_llama, *arguments, "--max-tokens", "6").returncode == 0
    assert texts_of(output) == texts
    content = output.read_bytes()
    refused = generate(tiny_llama, *arguments, "--max-tokens", "5")
    assert refused.returncode == 1
    assert "Choose another --output, or delete it" in refused.stderr
    assert output.read_bytes() == content


def test_the_offline_example_ends_on_an_error_of_ours_in_one_line(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "offline_inference.py"
    result = subprocess.run(
        [sys.executable, example, "--model", tmp_path / "nothing-here"], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.stderr
