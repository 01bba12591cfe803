"""What the engine shows of itself: its view and the counts that limits are checked against, by a core without a model."""

from __future__ import annotations

import pytest
from simulated import SimulatedExecutor

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.errors import InvalidRequestError
from cacheflow.types import BLOCK_CACHED, BLOCK_FREE, BLOCK_OWNED, BLOCK_SHARED, EngineRequest, SamplingParams

BLOCK_SIZE = 4


def make_core(num_blocks: int = 40, max_num_seqs: int = 8) -> EngineCore:
    config = EngineConfig(block_size=BLOCK_SIZE, max_num_batched_tokens=64, max_num_seqs=max_num_seqs)
    return EngineCore(config, SimulatedExecutor(num_blocks, BLOCK_SIZE, 64))


def test_too_many_sequences_are_refused_by_the_field_that_asked_for_them() -> None:
    core = make_core(max_num_seqs=4)
    for fields, name in (({"n": 5}, "n"), ({"n": 2, "best_of": 6}, "best_of")):
        params = SamplingParams(max_tokens=2, seed=0, **fields)
        with pytest.raises(InvalidRequestError, match=f"^{name} asks for {params.num_sequences} sequences at a time") as caught:
            core.add(EngineRequest(request_id="a", prompt_token_ids=[1], params=params, arrival_s=0.0))
        assert caught.value.param == name


def request(request_id: str, prompt: list[int], n: int = 1, max_tokens: int = 20, arrival_s: float = 0.0) -> EngineRequest:
    params = SamplingParams(n=n, max_tokens=max_tokens, temperature=0.0 if n == 1 else 1.0, seed=0, ignore_eos=True)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params, arrival_s=arrival_s)


def test_each_block_is_shown_with_who_holds_it() -> None:
    core = make_core()
    core.add(request("a", [1] * 9))
    core.add(request("b", [2] * 5))
    core.step()
    view = core.view()
    assert [(r.request_id, r.is_running) for r in view.requests] == [("a", True), ("b", True)]
    assert [r.num_computed_tokens for r in view.requests] == [9, 5]
    assert view.blocks.count(BLOCK_OWNED) == 3
    assert view.blocks.count(BLOCK_OWNED + 1) == 2
    assert view.blocks.count(BLOCK_FREE) == view.stats.num_free_blocks == 35
    core.abort("a")
    assert [r.request_id for r in core.view().requests] == ["b"]
    assert core.view().blocks.count(BLOCK_CACHED) == core.stats().num_cached_blocks == 2


def test_blocks_of_several_sequences_or_requests_are_shown_as_shared() -> None:
    core = make_core()
    core.add(request("a", [1] * 9, n=3))
    core.step()
    core.step()
    view = core.view()
    assert view.requests[0].num_sequences == 3
    assert view.blocks.count(BLOCK_SHARED) == 2
    assert view.blocks.count(BLOCK_OWNED) == 3
    core.add(request("b", [1] * 8 + [2]))
    core.step()
    assert core.view().blocks.count(BLOCK_SHARED) == 2
    assert core.view().blocks.count(BLOCK_OWNED + 1) == 1


def test_running_requests_come_before_waiting_ones_and_the_list_is_bounded() -> None:
    core = make_core(max_num_seqs=2)
    for number in range(300):
        core.add(request(str(number), [1, 2, 3], arrival_s=float(number)))
    core.abort("3")
    core.step()
    view = core.view()
    assert len(view.requests) == 256
    assert [r.is_running for r in view.requests] == [True] * 2 + [False] * 254
    assert [r.request_id for r in view.requests[:4]] == ["0", "1", "2", "4"]


def test_the_counts_behind_the_limits_follow_every_request_to_its_end() -> None:
    core = make_core(num_blocks=12, max_num_seqs=4)
    for number in range(6):
        core.add(request(str(number), [number + 10] * 8, n=1 + number % 2, max_tokens=12))
    core.abort("5")
    while core.has_unfinished:
        core.step()
        waiting = [r for r in core.view().requests if not r.is_running]
        assert core.scheduler.num_waiting_tokens == sum(r.num_prompt_tokens + r.num_output_tokens for r in waiting)
        assert core.scheduler.num_unfinished_sequences <= 7
    assert core.stats().num_preemptions > 0
    assert core.scheduler.num_waiting_tokens == core.scheduler.num_unfinished_sequences == 0
    assert core.scheduler.num_admitted_tokens > 5 * 8
