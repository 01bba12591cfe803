"""Profiles of steps: nothing where none is asked for, sums and a trace where one is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cacheflow.config import EngineConfig
from cacheflow.conformance.tiny_model import write_tiny_model
from cacheflow.errors import ConfigError
from cacheflow.llm import LLM
from cacheflow.profile import EXECUTE, Spans, StepProfile, TimedOps, no_span
from cacheflow.types import SamplingParams


def test_spans_are_taken_once_and_in_their_order() -> None:
    spans = Spans()
    with spans.span("a"):
        pass
    assert spans.timed("b", int)("3") == 3
    assert [name for name, _, _ in spans.take()] == ["a", "b"]
    assert spans.take() == ()


def test_the_table_has_a_worker_s_spans_inside_execute() -> None:
    profile = StepProfile(None, is_logged=False)
    with profile.span(EXECUTE):
        pass
    profile.end_step(7, [("forward", 0, 2_000_000), ("forward", 0, 1_000_000)])
    lines = profile.table().splitlines()
    assert lines[0] == "1 steps, 7 tokens computed"
    execute = next(i for i, line in enumerate(lines) if line.startswith(EXECUTE))
    assert lines[execute + 1].split()[:3] == ["forward", "2", "3.000"]


def test_without_a_profile_a_span_is_one_shared_object() -> None:
    assert no_span("a") is no_span("b")


def test_a_trace_has_every_phase_of_a_step_and_nothing_else_changes(tmp_path: Path) -> None:
    config = write_tiny_model(tmp_path)
    params, prompts, ids = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True), [[5, 6, 7], [8, 9]], []
    for trace in (None, str(tmp_path / "trace.json")):
        llm = LLM(config.model, dtype="float32", use_dummy_weights=True, trace=trace, profile=trace is not None)
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
        ids.append([output.outputs[0].token_ids for output in outputs])
        llm.close()
        llm.close()
    assert ids[0] == ids[1]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert names >= {"schedule", EXECUTE, "apply", "detokenise", "input", "forward", "forward: attention", "logits", "sample"}
    assert any(name.startswith("forward: linear ") for name in names)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_a_step_is_executed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(write_tiny_model(tmp_path).model, dtype="float32", use_dummy_weights=True, profile=True)
    with caplog.at_level(logging.INFO, "cacheflow"):
        llm.generate(prompt_token_ids=[[5]], sampling_params=SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        llm.close()
    lines = [line.split() for line in caplog.text.splitlines()]
    assert [line[1] for line in lines if line and line[0] in ("schedule", EXECUTE, "wait", "apply")] == ["3"] * 4


def test_spans_of_a_trace_lie_inside_one_another_or_apart(tmp_path: Path) -> None:
    """Perfetto draws those of one thread as a stack, and drops what overlaps."""
    config = write_tiny_model(tmp_path)
    llm = LLM(config.model, dtype="float32", use_dummy_weights=True, trace=str(tmp_path / "trace.json"))
    llm.generate(prompt_token_ids=[[5, 6, 7]], sampling_params=SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    llm.close()
    events = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    for thread in {event["tid"] for event in events}:
        ends: list[float] = []
        for event in sorted((e for e in events if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert not ends or end <= ends[-1] + 1e-3, event
            ends.append(end)


def test_a_trace_that_could_not_be_written_at_the_end_is_refused_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "trace.json"):
        with pytest.raises(ConfigError, match="--trace .* can't be written"):
            EngineConfig(trace=str(path))


def test_a_trace_that_can_t_be_written_does_not_keep_the_engine_from_closing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = StepProfile(str(tmp_path / "gone" / "trace.json"), is_logged=False)
    with caplog.at_level(logging.ERROR):
        profile.close()
    assert "can't be written" in caplog.text


def test_attributes_that_are_no_ops_are_passed_through() -> None:
    class Ops:
        name = "mine"

    assert TimedOps(Ops(), Spans()).name == "mine"
    assert TimedOps(Ops(), Spans()).decoder is None


def test_a_profile_is_off_by_default() -> None:
    config = EngineConfig()
    assert not config.profile
    assert config.trace is None
