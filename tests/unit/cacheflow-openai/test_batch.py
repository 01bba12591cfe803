"""The files of `run-batch`: what of an input is left to do, and what stands in the output."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cacheflow.errors import ConfigError, EngineDeadError
from cacheflow_openai import batch
from cacheflow_openai.batch import BatchOutput, pending_lines, run_lines


def request(name: str, **fields: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": name}, **fields}


def write(path: Path, *entries: dict[str, Any] | str) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


class App:
    """Answers with what it was asked, in the reverse order of asking; the given ids get 503 a number of times first."""

    def __init__(self, **busy: int) -> None:
        self.busy, self.asked = busy, []  # type: dict[str, int], list[str]
        self.num_running = self.most_running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.asked.append(body["prompt"])
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        for _ in range(20 - len(self.asked) % 10):
            await asyncio.sleep(0)
        self.num_running -= 1
        is_busy = self.busy.get(body["prompt"], 0) > 0
        if is_busy:
            self.busy[body["prompt"]] -= 1
        status = 503 if is_busy else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": json.dumps({"id": "x", "echo": body["prompt"]}).encode()})


def run(app: Any, source: Path, target: Path, max_concurrency: int = 4) -> list[dict[str, Any]]:
    output = BatchOutput(target)
    try:
        lines = pending_lines(source, output.done)
        work = run_lines(app, source, lines, output, max_concurrency=max_concurrency, on_done=lambda is_good: None)
        asyncio.run(asyncio.wait_for(work, 180))
    finally:
        output.close()
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_every_line_gets_one_answer(tmp_path: Path) -> None:
    names = [f"r{i}" for i in range(30)]
    app = App()
    answers = run(app, write(tmp_path / "in", *map(request, names), ""), tmp_path / "out")
    assert sorted(a["custom_id"] for a in answers) == sorted(names)
    assert all(a["response"]["status_code"] == 200 and a["response"]["body"]["echo"] == a["custom_id"] for a in answers)
    assert all(a["error"] is None and a["response"]["request_id"] == "x" for a in answers)
    assert app.most_running == 4


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_run_goes_on_behind_the_last_whole_line(tmp_path: Path, cut: int) -> None:
    source = write(tmp_path / "in", *(request(f"r{i}") for i in range(6)))
    target = tmp_path / "out"
    run(App(), source, target)
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    app = App()
    answers = run(app, source, target)
    assert len(app.asked) == 3
    assert sorted(a["custom_id"] for a in answers) == [f"r{i}" for i in range(6)]


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"), "nonsense")
    run(App(), source, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    app = App()
    run(app, source, tmp_path / "out")
    assert app.asked == []
    assert (tmp_path / "out").read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "[" * 5000,
        {"method": "POST"},
        request("a", method="GET"),
        request("a", url="/v1/files"),
        request("a", url=["/v1/completions"]),
        request("a", body="text"),
        request("a", body={"stream": True}),
        request("a" * 600),
        request("\ud800"),
    ],
    ids=lambda line: json.dumps(line)[:40],
)
def test_a_line_that_is_no_request_gets_an_error_and_the_others_their_answers(tmp_path: Path, line: Any) -> None:
    answers = run(App(), write(tmp_path / "in", request("good"), line), tmp_path / "out")
    bad = next(a for a in answers if a["custom_id"] != "good")
    assert len(answers) == 2
    assert bad["response"] is None
    assert bad["error"]["code"] == "invalid_line"
    assert bad["error"]["line"] == 2


def test_two_lines_with_one_custom_id_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    app = App()
    with pytest.raises(ConfigError, match="lines 1 and 3 have the same custom_id 'a'"):
        run(app, write(tmp_path / "in", request("a"), request("b"), request("a")), tmp_path / "out")
    assert app.asked == []


def test_the_output_of_another_input_is_refused(tmp_path: Path) -> None:
    run(App(), write(tmp_path / "in", request("a")), tmp_path / "out")
    with pytest.raises(ConfigError, match="of another input"):
        run(App(), write(tmp_path / "other", request("b")), tmp_path / "out")


def test_a_file_that_is_no_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    target = write(tmp_path / "out", "my notes")
    with pytest.raises(ConfigError, match="line 1 is no answer"):
        run(App(), write(tmp_path / "in", request("a")), target)
    assert target.read_text() == "my notes\n"


def test_one_output_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    first = BatchOutput(tmp_path / "out")
    with pytest.raises(ConfigError, match="another process"):
        BatchOutput(tmp_path / "out")
    first.close()
    BatchOutput(tmp_path / "out").close()


def test_a_request_that_the_engine_has_no_room_for_is_tried_again(tmp_path: Path) -> None:
    app = App(a=3)
    answers = run(app, write(tmp_path / "in", request("a")), tmp_path / "out")
    assert app.asked == ["a"] * 4
    assert answers[0]["response"]["status_code"] == 200


def test_an_error_that_nobody_foresaw_is_the_answer_of_its_request_alone(tmp_path: Path) -> None:
    class Broken(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            body = (await receive())["body"]
            status = 500 if b"bad" in body else 200
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
            if status == 500:
                raise RuntimeError("Raised again, as Starlette does.")

    answers = run(Broken(), write(tmp_path / "in", request("a"), request("bad"), request("b")), tmp_path / "out")
    assert {a["custom_id"]: a["response"]["status_code"] for a in answers} == {"a": 200, "bad": 500, "b": 200}


def test_an_engine_that_stays_away_ends_the_run_and_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_TRIES", 2)
    source = write(tmp_path / "in", request("a"), request("gone"), request("b"))
    with pytest.raises(EngineDeadError, match="Run the same command again"):
        run(App(gone=100), source, tmp_path / "out", max_concurrency=1)
    assert [json.loads(line)["custom_id"] for line in (tmp_path / "out").read_text().splitlines()] == ["a"]
    assert {a["custom_id"] for a in run(App(), source, tmp_path / "out")} == {"a", "b", "gone"}
