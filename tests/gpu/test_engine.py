"""The engine on a GPU: graphs and steps made ahead change no token, and a launch waits for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.interfaces import SampleSpec, ScheduledSequence, Step
from cacheflow.types import EngineRequest, SamplingParams
from cacheflow.worker.runner import Runner

BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
PARAMS = (
    SamplingParams(temperature=0.0, seed=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=1, max_tokens=21, ignore_eos=True),
    SamplingParams(temperature=1.1, seed=2, max_tokens=30, top_p=0.9, top_k=40, logprobs=2),
    SamplingParams(temperature=0.9, seed=3, max_tokens=17, frequency_penalty=0.5, min_p=0.02),
    SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=12, ignore_eos=True),
)


def _config(folder: Path, backend: str, **changes: Any) -> EngineConfig:
    options = {
        "dtype": "float16",
        "device": "cuda",
        "gpu_memory_utilization": 0.6,
        "max_num_seqs": 16,
        "attention_backend": backend,
    }
    return EngineConfig(model=str(folder), load_format="safetensors", **options | changes)


def _generate(config: EngineConfig) -> dict[str, dict[int, list[int]]]:
    core = EngineCore(config)
    outputs: dict[str, dict[int, list[int]]] = {}
    for i in range(15):
        params = PARAMS[i % len(PARAMS)]
        prompt = [4 + (11 * i + 3 * j) % 290 for j in range(1 + 9 * i)]
        core.add(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params, arrival_s=float(i)))
    while core.has_unfinished:
        for update in core.step():
            assert update.error is None
            for sequence in update.sequences:
                outputs.setdefault(update.request_id, {}).setdefault(sequence.index, []).extend(sequence.new_token_ids)
        core.scheduler.check()
    core.close()
    return outputs


def _share_of_equal_prefixes(a: dict[str, dict[int, list[int]]], b: dict[str, dict[int, list[int]]]) -> float:
    """How many of the tokens come before the first that differs: products of other sizes round otherwise, and one token changes
    all that follow; what is wrong differs at once."""
    same = total = 0
    for name, sequences in a.items():
        for index, tokens in sequences.items():
            other = b[name][index]
            total += len(tokens)
            same += next((i for i, (x, y) in enumerate(zip(tokens, other, strict=False)) if x != y), len(tokens))
    return same / total


@BACKENDS
def test_steps_made_ahead_give_what_steps_one_by_one_give(gpu_llama: Path, backend: str) -> None:
    ahead, step_by_step = (_generate(_config(gpu_llama, backend, run_ahead=how)) for how in ("auto", "never"))
    assert ahead.keys() == step_by_step.keys()
    assert _share_of_equal_prefixes(ahead, step_by_step) > 0.5


@BACKENDS
def test_captured_steps_give_what_launched_ones_give(gpu_llama: Path, backend: str) -> None:
    captured, eager = (_generate(_config(gpu_llama, backend, enforce_eager=how)) for how in (False, True))
    assert captured.keys() == eager.keys()
    assert _share_of_equal_prefixes(captured, eager) > 0.5


@BACKENDS
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_launch_waits_for_nothing(gpu_llama: Path, backend: str, enforce_eager: bool) -> None:
    runner = Runner(_config(gpu_llama, backend, enforce_eager=enforce_eager))
    params = (*PARAMS[:3], PARAMS[3])

    def step(position: int) -> Step:
        sequences = tuple(
            ScheduledSequence(
                sequence_id=i,
                token_ids=[7] * (12 if position == 0 else 1),
                num_computed_tokens=0 if position == 0 else 11 + position,
                block_table=[2 * i, 2 * i + 1],
                samples=(
                    SampleSpec(
                        sequence_id=i,
                        request_index=i,
                        index=0,
                        params=each,
                        prompt_token_ids=[7] * 12,
                        output_token_ids=[7] * position,
                    ),
                ),
            )
            for i, each in enumerate(params)
        )
        return Step(sequences=sequences)

    for position in range(3):  # Compiled, captured, and memory is there.
        runner.launch(step(position)).result()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = runner.launch(step(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(samples) == 1 for samples in launched.result().samples)
