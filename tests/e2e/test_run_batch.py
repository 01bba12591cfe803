"""`cacheflow run-batch` as a process that is killed again and again."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

from programs import DEADLINE_S, Program

NUM_REQUESTS = 60


def batch_file(path: Path) -> list[dict[str, Any]]:
    bodies: list[tuple[str, dict[str, Any]]] = []
    for i in range(NUM_REQUESTS):
        if i % 10 == 9:
            bodies.append(("/v1/embeddings", {"input": f"text {i}"}))
        elif i % 10 == 5:
            bodies.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": f"hi {i}"}], "max_tokens": 20}))
        else:
            body = {"prompt": f"number {i}", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
            bodies.append(("/v1/completions", body))
    entries = [{"custom_id": f"r{i}", "method": "POST", "url": url, "body": body} for i, (url, body) in enumerate(bodies)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "not a request\n")
    return entries


def test_no_request_is_lost_or_answered_twice_however_often_it_is_killed(tmp_path: Path, tiny_llama: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    entries = batch_file(source)
    moments = random.Random(5)
    arguments: tuple[str, ...] = ("run-batch", str(source), str(target), "--model", str(tiny_llama), "--dtype", "float32")
    arguments += ("--kv-cache-memory", "0.05", "--max-concurrency", "4")
    for attempt in range(4):
        program = Program(tmp_path / f"log{attempt}", tmp_path, *arguments)
        num_before = len(target.read_bytes().splitlines()) if target.exists() else 0
        num_wanted = num_before + moments.randint(1, 12)
        deadline = time.monotonic() + DEADLINE_S
        while program.process.poll() is None and time.monotonic() < deadline:
            if target.exists() and len(target.read_bytes().splitlines()) >= num_wanted:
                break
            time.sleep(0.001)
        program.process.send_signal(signal.SIGKILL)
        program.process.wait(DEADLINE_S)
        assert num_before < len(target.read_bytes().splitlines()) < NUM_REQUESTS, program.log.read_text()
        with target.open("ab") as file:
            file.write(b'{"id": "batch_req_'[: moments.randint(0, 18)])
    last = Program(tmp_path / "log", tmp_path, *arguments)
    assert last.process.wait(DEADLINE_S) == 0, last.log.read_text()

    answers = [json.loads(line) for line in target.read_text().split("\n") if line]
    assert sorted(str(a["custom_id"]) for a in answers) == sorted([*(e["custom_id"] for e in entries), "None"])
    assert [a["error"]["line"] for a in answers if a["error"]] == [NUM_REQUESTS + 1]
    assert {a["response"]["status_code"] for a in answers if a["response"]} == {200}
