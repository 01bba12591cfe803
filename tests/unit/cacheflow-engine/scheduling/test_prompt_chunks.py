"""How much of a prompt comes into one step, by a core without a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from simulated import Result, SimulatedExecutor

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.interfaces import Step
from cacheflow.types import EngineRequest, SamplingParams


@dataclass
class Watched(SimulatedExecutor):
    """Remembers how many tokens each sequence of a step had."""

    steps: list[list[int]] = field(default_factory=list)

    def submit(self, step: Step) -> Result:
        self.steps.append([len(sequence.token_ids) for sequence in step.sequences])
        return super().submit(step)


def request(number: int, num_prompt_tokens: int) -> EngineRequest:
    params = SamplingParams(max_tokens=20, temperature=0.0, seed=0, ignore_eos=True)
    prompt = [(number + place) % 40 + 8 for place in range(num_prompt_tokens)]
    return EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params, arrival_s=float(number), client_id="")


def test_prompts_come_in_chunks_beside_streams_and_at_once_without_them() -> None:
    executor = Watched(200, 4, 256)
    config = EngineConfig(block_size=4, max_num_batched_tokens=64, max_num_seqs=16, prompt_chunk_size=12)
    core = EngineCore(config, executor)
    core.add(request(0, 50))
    core.step()
    core.add(request(1, 30))
    core.add(request(2, 10))
    for _ in range(4):
        core.step()
    # Two prompts share the chunk where the first leaves room.
    assert executor.steps == [[50], [1, 12], [1, 12], [1, 6, 6], [1, 1, 4]]
