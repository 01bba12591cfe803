"""The executor in the calling thread: what it refuses, and how errors travel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cacheflow.config import EngineConfig
from cacheflow.errors import EngineDeadError, InvalidRequestError, OutOfMemoryError
from cacheflow.executors.local import LocalExecutor
from cacheflow.interfaces import SampleSpec, ScheduledSequence, Step
from cacheflow.types import SamplingParams
from cacheflow.worker.runner import Runner


def _step(params: SamplingParams) -> Step:
    spec = SampleSpec(sequence_id=0, request_index=0, index=0, params=params, prompt_token_ids=[5, 6], output_token_ids=[])
    return Step(
        sequences=(ScheduledSequence(sequence_id=0, token_ids=[5, 6], num_computed_tokens=0, block_table=[0], samples=(spec,)),)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is 2"),
        ({"pipeline_parallel_size": 3}, "--pipeline-parallel-size is 3"),
        ({"device": "cuda", "swap_space": 1.5}, "--swap-space is 1.5 GiB"),
    ],
)
def test_what_needs_another_executor_is_refused_by_the_options_name(options: dict[str, object], words: str) -> None:
    (reason,) = LocalExecutor.supports(EngineConfig.from_mapping(options))
    assert words in reason


def test_swap_space_on_a_cpu_is_supported() -> None:
    assert LocalExecutor.supports(EngineConfig(device="cpu", swap_space=1.5)) == ()


def test_an_error_comes_with_the_result_and_the_next_step_works(tiny_llama: Path) -> None:
    executor = LocalExecutor()
    executor.start(
        EngineConfig(
            model=str(tiny_llama), device="cpu", num_threads=1, kv_cache_memory=0.005, max_model_len=64, max_num_seqs=2
        )
    )
    pending = executor.submit(_step(SamplingParams(seed=0, allowed_token_ids=[2], min_tokens=1)))
    with pytest.raises(InvalidRequestError, match="allows no token"):
        pending.result()
    step = Step(sequences=_step(SamplingParams(seed=0)).sequences, finished_requests=(0,))
    assert len(executor.submit(step).result().samples[0]) == 1
    executor.check()
    executor.close()
    with pytest.raises(EngineDeadError, match="closed"):
        executor.check()


def test_memory_that_runs_out_in_a_step_has_a_name_that_the_core_knows(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = LocalExecutor()
    executor.start(EngineConfig(model=str(tiny_llama), device="cpu", num_threads=1, kv_cache_memory=0.005, max_model_len=64))
    monkeypatch.setattr(Runner, "launch", lambda self, step: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(OutOfMemoryError, match="allocate"):
        executor.submit(_step(SamplingParams(seed=0))).result()
    executor.close()


def test_a_step_before_the_start_is_an_error() -> None:
    with pytest.raises(EngineDeadError, match="never started"):
        LocalExecutor().submit(_step(SamplingParams(seed=0)))
