"""What a server measures, from updates that are made here."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from cacheflow.errors import EngineDeadError, EngineDrainingError, EngineOverloadedError
from cacheflow.metrics import Metrics
from cacheflow.types import (
    CompletionOutput,
    EngineRequest,
    EngineStats,
    ModelInfo,
    RequestOutput,
    RequestUpdate,
    SamplingParams,
    SequenceUpdate,
    TokenizerData,
)

INFO = ModelInfo(
    model="tiny", architecture="A", dtype="float32", vocab_size=10, max_model_len=100, max_num_seqs=4,
    tokenizer=TokenizerData(tokenizer_json="{}"), engine_version="0",
)  # fmt: skip
STATS = EngineStats(
    num_running=2, num_waiting=3, num_blocks=10, num_free_blocks=4, num_cached_blocks=1, num_preemptions=6,
    num_prompt_tokens=70, num_generated_tokens=80, num_cached_tokens=9, num_steps=11,
)  # fmt: skip


class Engine:
    """Gives a reading, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def stats(self) -> EngineStats:
        if self.error:
            raise self.error
        return STATS


def exposition(metrics: Metrics, error: Exception | None = None) -> dict[str, float]:
    """Sample name with labels → value."""
    text = asyncio.run(metrics.exposition(Engine(error))).decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def request() -> EngineRequest:
    return EngineRequest(request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=5), arrival_s=0.0)


def deliver(timer: Any, num_tokens: int, total: int, finish_reason: str | None = None) -> None:
    update = RequestUpdate(
        request_id="r",
        sequences=[SequenceUpdate(index=0, new_token_ids=[4] * num_tokens, cumulative_logprob=0.0)],
        finished=finish_reason is not None,
    )
    sequence = CompletionOutput(index=0, text="", token_ids=[4] * total, cumulative_logprob=0.0, finish_reason=finish_reason)
    output = RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=[1, 2, 3], outputs=[sequence], finished=finish_reason is not None
    )
    timer.update(update, output)


def test_a_finished_request_counts_in_every_histogram() -> None:
    metrics = Metrics(INFO)
    with metrics.request(request()) as timer:
        deliver(timer, 1, 1)
        deliver(timer, 2, 3)
        deliver(timer, 1, 4, "length")
    found = exposition(metrics)
    label = '{model_name="tiny"}'
    assert found[f"cacheflow:time_to_first_token_seconds_count{label}"] == 1
    assert found[f"cacheflow:inter_token_latency_seconds_count{label}"] == 2
    assert found[f"cacheflow:e2e_request_latency_seconds_count{label}"] == 1
    assert found[f"cacheflow:request_generation_tokens_sum{label}"] == 4
    assert found[f"cacheflow:request_prompt_tokens_sum{label}"] == 3
    assert found['cacheflow:request_success_total{finished_reason="length",model_name="tiny"}'] == 1


def test_an_embedding_counts_with_its_time_and_prompt_and_in_no_histogram_of_texts() -> None:
    metrics = Metrics(INFO)
    asked = EngineRequest(
        request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=1), arrival_s=0.0, task="embed"
    )
    with metrics.request(asked) as timer:
        timer.finish("stop")
    found = exposition(metrics)
    counts = {name.partition("{")[0]: value for name, value in found.items() if "_count{" in name and value}
    assert counts == {"cacheflow:e2e_request_latency_seconds_count": 1, "cacheflow:request_prompt_tokens_count": 1}
    assert found['cacheflow:request_success_total{finished_reason="stop",model_name="tiny"}'] == 1


def test_no_series_tells_when_it_began() -> None:
    metrics = Metrics(INFO)
    with metrics.request(request()) as timer:
        deliver(timer, 1, 1, "stop")
    assert not [name for name in exposition(metrics) if "_created" in name]


def test_the_engines_numbers_have_the_fields_names() -> None:
    found = exposition(Metrics(INFO))
    expected = {
        "engine_up": 1, "num_requests_running": 2, "num_requests_waiting": 3, "kv_cache_usage_perc": 0.5,
        "num_preemptions_total": 6, "prompt_tokens_total": 70, "generation_tokens_total": 80, "prefix_cache_hits_total": 9,
        "prefix_cache_queries_total": 70,
    }  # fmt: skip
    assert {name: found[f'cacheflow:{name}{{model_name="tiny"}}'] for name in expected} == expected


@pytest.mark.parametrize("error", [EngineDeadError("Gone."), EngineOverloadedError("Too many questions wait.")])
def test_an_engine_that_gives_no_numbers_is_left_out_and_said_so(error: Exception) -> None:
    found = exposition(Metrics(INFO), error)
    assert found['cacheflow:engine_up{model_name="tiny"}'] == 0
    assert 'cacheflow:num_requests_running{model_name="tiny"}' not in found


@pytest.mark.parametrize(
    ("error", "name", "reason"),
    [
        (EngineOverloadedError("Full."), "admission_rejections_total", 'reason="overloaded"'),
        (EngineDrainingError("Ending."), "admission_rejections_total", 'reason="draining"'),
        (EngineDeadError("Gone."), "admission_rejections_total", 'reason="engine_unavailable"'),
        (ValueError("Bug."), "request_success_total", 'finished_reason="error"'),
        (asyncio.CancelledError(), "request_success_total", 'finished_reason="abort"'),
        (GeneratorExit(), "request_success_total", 'finished_reason="abort"'),
    ],
)
def test_a_request_that_does_not_finish_counts_by_why(error: BaseException, name: str, reason: str) -> None:
    metrics = Metrics(INFO)
    with pytest.raises(type(error)), metrics.request(request()):
        raise error
    counted = {key: value for key, value in exposition(metrics).items() if "_total" in key and ("reason" in key) and value}
    labels = f'{{model_name="tiny",{reason}}}' if name.startswith("admission") else f'{{{reason},model_name="tiny"}}'
    assert counted == {f"cacheflow:{name}{labels}": 1}


def test_the_summary_has_percentiles_of_what_there_was() -> None:
    metrics = Metrics(INFO)
    assert metrics.summary()["ttft_s"] is None
    with metrics.request(request()) as timer:
        deliver(timer, 1, 1)
        deliver(timer, 1, 2, "stop")
    summary = metrics.summary()
    assert summary["ttft_s"]["num_samples"] == summary["itl_s"]["num_samples"] == 1
    assert 0 <= summary["ttft_s"]["p50"] <= summary["ttft_s"]["p99"] < 60
    assert summary["output_tokens_per_s"] == 0.2


def test_two_servers_of_one_process_have_a_registry_each() -> None:
    one, other = Metrics(INFO), Metrics(INFO)
    with one.request(request()) as timer:
        deliver(timer, 1, 1, "stop")
    assert exposition(other)['cacheflow:time_to_first_token_seconds_count{model_name="tiny"}'] == 0


def test_an_llm_in_process_loads_neither_sockets_nor_metrics() -> None:
    code = (
        "import sys; from cacheflow import LLM; LLM.generate\n"
        "print([name for name in ('prometheus_client', 'msgspec', 'zmq') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
