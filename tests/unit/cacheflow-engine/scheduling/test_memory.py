"""Steps that find too little memory: what becomes of them, by a core without a model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from simulated import Result, SimulatedExecutor, next_token

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.errors import OutOfMemoryError
from cacheflow.interfaces import Step
from cacheflow.scheduling.scheduler import GOOD_STEPS
from cacheflow.types import EngineRequest, SamplingParams


@dataclass
class SmallExecutor(SimulatedExecutor):
    """Finds too little memory for steps of more than `room` tokens."""

    room: int = 8
    num_failures: int = 0
    largest: int = 0

    def submit(self, step: Step) -> Result:
        num_tokens = sum(len(s.token_ids) for s in step.sequences)
        if num_tokens > self.room:
            self.num_failures += 1
            return Result(OutOfMemoryError(f"{num_tokens} tokens"))
        self.largest = max(self.largest, num_tokens)
        return super().submit(step)


def make_core(room: int) -> tuple[EngineCore, SmallExecutor]:
    executor = SmallExecutor(200, 4, 64, room=room)
    return EngineCore(EngineConfig(block_size=4, max_num_batched_tokens=64, max_num_seqs=16), executor), executor


def request(number: int, n: int = 1, max_tokens: int = 12, is_beam: bool = False) -> EngineRequest:
    params = SamplingParams(n=n, max_tokens=max_tokens, temperature=0.0, seed=0, ignore_eos=True, use_beam_search=is_beam)
    return EngineRequest(
        request_id=str(number), prompt_token_ids=[number + 8] * 10, params=params, arrival_s=0.0, client_id=str(number % 2)
    )


def run(core: EngineCore) -> tuple[dict[str, list[int]], dict[str, str]]:
    tokens: dict[str, list[int]] = {}
    errors: dict[str, str] = {}
    for _ in range(5000):
        if not core.has_unfinished:
            break
        for update in core.step():
            if update.error is not None:
                errors[update.request_id] = update.error
            for sequence in update.sequences:
                tokens.setdefault(update.request_id, []).extend(sequence.new_token_ids)
    assert not core.has_unfinished
    core.scheduler.kv.check()
    assert core.stats().num_free_blocks + core.stats().num_cached_blocks == core.stats().num_blocks
    return tokens, errors


@pytest.mark.parametrize("room", [1, 3, 8, 20])
def test_too_little_memory_for_a_batch_fails_nobody_and_changes_no_token(room: int) -> None:
    core, executor = make_core(room)
    for number in range(10):
        core.add(request(number))
    tokens, errors = run(core)
    assert not errors
    assert executor.num_failures > 0
    for number in range(10):
        context = [number + 8] * 10
        for token in tokens[str(number)]:
            assert token == next_token(context)
            context.append(token)
        assert len(context) == 22


def test_after_a_while_steps_grow_again() -> None:
    core, executor = make_core(room=4)
    for number in range(10):
        core.add(request(number, max_tokens=3 * GOOD_STEPS))
    while executor.num_failures < 4:
        core.step()
    executor.room = 64
    run(core)
    assert executor.largest >= 8


def test_a_long_prompt_that_must_start_again_gets_through_between_two_tries_of_larger_steps() -> None:
    core, executor = make_core(room=1)
    long = EngineRequest(
        request_id="long", prompt_token_ids=[8] * (2 * GOOD_STEPS), params=SamplingParams(seed=0), arrival_s=0.0, task="embed"
    )
    core.add(long)
    run(core)
    assert executor.num_failures == 7


def test_a_request_that_alone_finds_too_little_memory_fails_with_the_numbers_and_the_others_go_on() -> None:
    core, _ = make_core(room=3)
    for number in range(4):
        core.add(request(number, n=8 if number == 2 else 1, is_beam=number == 2))
    tokens, errors = run(core)
    assert list(errors) == ["2"]
    assert "A step of 8 tokens of this request alone (10 prompt tokens, 8 sequences) found too little memory" in errors["2"]
    assert all(len(tokens[str(number)]) == 12 for number in (0, 1, 3))
