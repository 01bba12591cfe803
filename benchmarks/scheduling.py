"""What scheduling costs, without a model: ms a step to choose, lay out and apply it, as the queue grows.

An executor that computes nothing answers at once, so that all the time is the scheduler's, the block manager's and the
building of batches. The aim: under 1 ms a step to schedule with 256 running and 10,000 waiting, and no growth with the queue.

    python benchmarks/scheduling.py
    python benchmarks/scheduling.py --waiting 0 1000 10000 100000 --policy fair
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import ClassVar

import torch
from record import surroundings, write

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.interfaces import AttentionSpec, Capacity, ModelSpec, Sample, Step, StepOutput
from cacheflow.types import EngineRequest, ModelInfo, SamplingParams, TokenizerData
from cacheflow.worker.batch import build_input

PROMPT_TOKENS, NUM_BLOCKS, BLOCK_SIZE = 128, 20_000, 16


class Idle:
    """An executor whose sequences all go on with token 5; it keeps the last step."""

    CONTRACT_VERSION: ClassVar[int] = 1

    def __init__(self) -> None:
        self.step: Step | None = None

    @classmethod
    def supports(cls, config: EngineConfig) -> tuple[str, ...]:
        """Everything."""
        return ()

    def start(self, config: EngineConfig) -> Capacity:
        """Pretends to have loaded a model."""
        spec = ModelSpec(
            attention=(AttentionSpec(layer=0, scale=1.0),), num_heads=1, num_kv_heads=1, head_size=1, hidden_size=1,
            vocab_size=1000, max_model_len=8192,
        )  # fmt: skip
        info = ModelInfo(
            model="none", architecture="None", dtype="float32", vocab_size=1000, max_model_len=8192,
            max_num_seqs=config.max_num_seqs, tokenizer=TokenizerData(tokenizer_json="{}", eos_token_ids=[7]),
            engine_version="0",
        )  # fmt: skip
        return Capacity(num_blocks=NUM_BLOCKS, spec=spec, info=info)

    def submit(self, step: Step) -> Idle:
        """Nothing to do."""
        self.step = step
        return self

    def result(self) -> StepOutput:
        """Token 5 for everyone who wants one."""
        assert self.step is not None
        sample = Sample(token_ids=[5], scores=[0.0], logprobs=[0.0])
        sequences = self.step.sequences
        return StepOutput(samples=[[sample] * len(s.samples) for s in sequences], prompt_logprobs=[None] * len(sequences))

    def check(self) -> None:
        """It is always well."""

    def close(self) -> None:
        """Nothing to free."""


def request(number: int, num_tokens: int) -> EngineRequest:
    """One with a prompt of its own, from one of eight clients."""
    prompt = [number % 1000, number // 1000 % 1000, *range(1, PROMPT_TOKENS - 1)]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(
        request_id=str(number), client_id=str(number % 8), prompt_token_ids=prompt, params=params, arrival_s=float(number)
    )


def measure(num_running: int, num_waiting: int, policy: str, num_steps: int) -> dict[str, float]:
    """Medians in ms over steps in which all that run decode, with some of them ending and others taking their places."""
    executor = Idle()
    config = EngineConfig(
        model="none", max_num_seqs=num_running, scheduling_policy=policy, max_num_batched_tokens=8192,
        max_waiting_requests=max(1024, 2 * (num_running + num_waiting)), max_waiting_tokens=10**9,
    )  # fmt: skip
    core = EngineCore(config, executor=executor)
    scheduler = core.scheduler
    # Each ends after another number of tokens, so that every step has ends and arrivals.
    started_s = time.perf_counter()
    for number in range(num_running + num_waiting):
        scheduler.add(request(number, 64 + number % 64 if num_waiting else num_steps + 100))
    adding_us = (time.perf_counter() - started_s) / (num_running + num_waiting) * 1e6
    times: dict[str, list[float]] = {"schedule": [], "batch": [], "apply": []}
    for number in range(num_steps + 70):
        marks = [time.perf_counter()]
        step = scheduler.schedule()
        marks.append(time.perf_counter())
        assert step is not None
        build_input(step, BLOCK_SIZE, torch.device("cpu"))
        marks.append(time.perf_counter())
        scheduler.apply(step, executor.submit(step).result())
        marks.append(time.perf_counter())
        if number >= 70:
            for name, start, end in zip(times, marks, marks[1:], strict=False):
                times[name].append(1e3 * (end - start))
    return {name: round(statistics.median(values), 3) for name, values in times.items()} | {
        "schedule_worst": round(max(times["schedule"]), 3),
        "add_us": round(adding_us, 1),
    }


def main() -> None:
    """Prints a table, a row a length of the queue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 1000, 10_000], help="requests in the queue")
    parser.add_argument("--running", type=int, default=256, help="requests that hold blocks (default: 256)")
    parser.add_argument("--policy", default="fcfs", help="a name in the cacheflow.schedulers group (default: fcfs)")
    parser.add_argument("--steps", type=int, default=100, help="how many are timed (default: 100)")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    facts = surroundings()
    print(
        "| waiting | schedule, ms | worst | build the batch, ms | apply, ms | add, µs |\n| --- | --- | --- | --- | --- | --- |"
    )
    for num_waiting in arguments.waiting:
        found = measure(arguments.running, num_waiting, arguments.policy, arguments.steps)
        columns = (found["schedule"], found["schedule_worst"], found["batch"], found["apply"], found["add_us"])
        print(f"| {num_waiting} | {' | '.join(map(str, columns))} |", flush=True)
        line = {
            "benchmark": "scheduling",
            "num_running": arguments.running,
            "num_waiting": num_waiting,
            "policy": arguments.policy,
        }
        write(arguments.output, {**line, **found, **facts})


if __name__ == "__main__":
    main()
