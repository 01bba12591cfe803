"""Steps that are made while another runs: the same tokens as without, whatever ends, comes, goes or fails in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import EOS, Result, SimulatedExecutor, next_token

from cacheflow import LLM
from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.errors import OutOfMemoryError
from cacheflow.interfaces import Step, StepOutput
from cacheflow.types import EngineRequest, SamplingParams

MAX_MODEL_LEN = 96
POISON = 12


class Late:
    """A submitted step: it runs when its result is wanted, or when its executor likes to."""

    def __init__(self, executor: LateExecutor, step: Step) -> None:
        self._executor = executor
        self.submitted = step
        self.step = _snapshot(step)
        self.outcome: Result | None = None
        self.is_done = False

    def result(self) -> StepOutput:
        self._executor.run_until(self)
        self.is_done = True
        assert self.outcome is not None
        return self.outcome.result()


class LateExecutor(SimulatedExecutor):
    """The simulated memory behind a queue, as a device has one. A step's tokens stay here for the one that follows it."""

    def __init__(self, num_blocks: int, budget: int, plan: list[tuple[bool, bool, str]]) -> None:
        super().__init__(num_blocks, 4, budget, poison=POISON, max_model_len=MAX_MODEL_LEN)
        # Of each step: whether it runs at once, whether another may follow, and what happens to it.
        self._plan: Iterator[tuple[bool, bool, str]] = cycle(plan)
        self._queue: deque[Late] = deque()
        self._submitted: list[Late] = []
        self._chosen: dict[int, int] | None = None
        self._may_follow = False
        self._fate: dict[int, str] = {}
        self.num_following = 0

    def can_follow(self, step: Step) -> bool:
        assert self._submitted[-1].submitted is step
        return self._may_follow

    def submit(self, step: Step) -> Late:  # type: ignore[override]
        self._submitted = [late for late in self._submitted if not late.is_done]
        assert len(self._submitted) <= int(step.follows), "more than two steps are on their way"
        late = Late(self, step)
        self._submitted.append(late)
        self._queue.append(late)
        self.num_following += step.follows
        runs_at_once, self._may_follow, self._fate[id(late)] = next(self._plan)
        if runs_at_once:
            self.run_until(late)
        return late

    def run_until(self, late: Late) -> None:
        while late.outcome is None:
            next_one = self._queue.popleft()
            next_one.outcome = self._run(next_one.step, self._fate.pop(id(next_one)))

    def _run(self, step: Step, fate: str) -> Result:
        if step.follows and self._chosen is None:
            for sequence in step.sequences:  # The step before failed: there is nothing but garbage to go on from.
                position = sequence.num_computed_tokens
                self.memory[sequence.block_table[position // 4] * 4 + position % 4] = (-1, -1)
            return Result(RuntimeError("it followed a step that failed"))
        if step.follows:
            step = replace(step, sequences=tuple(self._with_token(s) for s in step.sequences))
        outcome = super().submit(step)
        is_shared = len({spec.request_index for s in step.sequences for spec in s.samples}) > 1
        if fate == "fails" and is_shared:
            outcome = Result(RuntimeError("this time"))
        if fate == "finds no memory" and is_shared:
            outcome = Result(OutOfMemoryError("this time"))
        self._chosen = None
        if not isinstance(outcome.output, Exception):
            chosen = zip(step.sequences, outcome.output.samples, strict=True)
            self._chosen = {s.sequence_id: samples[0].token_ids[0] for s, samples in chosen if samples}
        return outcome

    def _with_token(self, sequence):  # type: ignore[no-untyped-def]
        assert self._chosen is not None
        assert list(sequence.token_ids) == [-1]
        token = self._chosen[sequence.sequence_id]
        (spec,) = sequence.samples
        assert spec.num_unknown == 1
        spec = replace(spec, output_token_ids=[*spec.output_token_ids, token], num_unknown=0)
        return replace(sequence, token_ids=[token], samples=(spec,))


def _snapshot(step: Step) -> Step:
    """The step with what its lists hold now."""
    return replace(
        step,
        sequences=tuple(
            replace(s, samples=tuple(replace(x, output_token_ids=list(x.output_token_ids)) for x in s.samples))
            for s in step.sequences
        ),
    )


def _expected(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    limit = min(params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(prompt))
    outputs = []
    for index in range(params.num_sequences):
        output: list[int] = []
        while len(output) < limit:
            output.append(next_token([*prompt, *output], index))
            if output[-1] in (EOS, *params.stop_token_ids) and len(output) > params.min_tokens:
                break
        outputs.append(output)
    return outputs


prompts = st.lists(st.integers(8, 11), min_size=1, max_size=30)
parameters = st.builds(
    lambda n, max_tokens, stop: SamplingParams(n=n, max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop),
    st.sampled_from([1, 1, 1, 2]),
    st.integers(1, 40),
    st.sampled_from([[], [3, 9, 20, 33]]),
)
plans = st.lists(
    st.tuples(
        st.booleans(), st.sampled_from([True, True, False]), st.sampled_from(["works"] * 8 + ["fails", "finds no memory"])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    work=st.lists(st.tuples(prompts, parameters, st.integers(0, 12)), min_size=1, max_size=8),
    plan=plans,
    aborts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7), st.sampled_from([None, 0, 1])), max_size=4),
    poisoned=st.integers(-1, 3),
    num_blocks=st.integers(25, 60),
    budget=st.integers(8, 40),
    caching=st.booleans(),
)
def test_steps_that_follow_others_change_no_token(
    work: list[tuple[list[int], SamplingParams, int]],
    plan: list[tuple[bool, bool, str]],
    aborts: list[tuple[int, int, int | None]],
    poisoned: int,
    num_blocks: int,
    budget: int,
    caching: bool,
) -> None:
    config = EngineConfig(block_size=4, max_num_batched_tokens=budget, max_num_seqs=6, enable_prefix_caching=caching)
    core = EngineCore(config, LateExecutor(num_blocks, budget, plan))
    expected: dict[str, list[list[int]]] = {}
    outputs: dict[str, dict[int, list[int]]] = {}
    finished: dict[str, str | None] = {}
    aborted: set[str] = set()
    for clock in range(4000):
        for number, (prompt, params, arrival) in enumerate(work):
            if arrival == clock:
                if number == poisoned:
                    prompt = [POISON, *prompt]
                request = EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params, arrival_s=arrival)
                core.add(request)
                expected[str(number)] = _expected(prompt, params)
        for when, number, index in aborts:
            if when == clock and str(number) in expected:
                core.abort(str(number), index=index)
                aborted.add(str(number))
        if not core.has_unfinished and clock > 12:
            break
        for update in core.step():
            assert update.request_id not in finished
            for sequence in update.sequences:
                outputs.setdefault(update.request_id, {}).setdefault(sequence.index, []).extend(sequence.new_token_ids)
            if update.finished:
                finished[update.request_id] = update.error
        core.scheduler.check()
    assert not core.has_unfinished
    for name, tokens in expected.items():
        if name == str(poisoned):
            assert name in aborted or finished[name] is not None
        elif name not in aborted:
            assert finished[name] is None
            assert [outputs[name][i] for i in sorted(outputs[name])] == tokens
    stats = core.stats()
    assert stats.num_free_blocks + stats.num_cached_blocks == num_blocks


def _core() -> tuple[EngineCore, LateExecutor]:
    executor = LateExecutor(60, 40, [(False, True, "works")])
    return EngineCore(EngineConfig(block_size=4, max_num_batched_tokens=40, max_num_seqs=6), executor), executor


def _add(core: EngineCore, name: str, prompt: list[int], max_tokens: int, **params: object) -> None:
    settings = SamplingParams(max_tokens=max_tokens, temperature=0.0, **({"ignore_eos": True} | params))
    core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=settings, arrival_s=0.0))


def test_nearly_every_step_of_a_stream_follows_another() -> None:
    core, executor = _core()
    _add(core, "a", [8, 9], 20)
    while core.has_unfinished:
        core.step()
    assert (executor.num_steps, executor.num_following) == (20, 19)


def test_no_step_is_made_for_a_sequence_that_has_all_its_tokens() -> None:
    core, executor = _core()
    _add(core, "a", [8, 9], 5)
    _add(core, "b", [9, 9], 9)
    while core.has_unfinished:
        core.step()
    assert executor.num_steps == 9


def test_a_request_that_can_be_let_in_does_not_wait_behind_following_steps() -> None:
    core, _ = _core()
    _add(core, "a", [8, 9], 30)
    for _ in range(5):
        core.step()
    _add(core, "b", [9, 10], 3)
    told = [update.request_id for _ in range(3) for update in core.step()]
    assert "b" in told


def test_an_interrupt_drops_the_steps_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    core, executor = _core()
    _add(core, "a", [8, 9], 12)
    tokens: list[int] = []

    def step() -> None:
        for update in core.step():
            for sequence in update.sequences:
                tokens.extend(sequence.new_token_ids)

    for _ in range(4):
        step()
    run: Callable[[Late], None] = executor.run_until

    def interrupt(late: Late) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "run_until", interrupt)
    with pytest.raises(KeyboardInterrupt):
        core.step()
    monkeypatch.setattr(executor, "run_until", run)
    for late in executor._submitted:
        late.is_done = True
    while core.has_unfinished:
        step()
    expected: list[int] = []
    while len(expected) < 12:
        expected.append(next_token([8, 9, *expected], 0))
    assert tokens == expected


@dataclass(frozen=True)
class _Job:
    """A request to the real engine."""

    prompt: list[int]
    params: SamplingParams


JOBS = (
    _Job([5, 6, 7], SamplingParams(temperature=0.0, seed=0, max_tokens=20, ignore_eos=True)),
    _Job([9] * 20, SamplingParams(temperature=1.0, seed=1, max_tokens=33, ignore_eos=True)),
    _Job([40, 41], SamplingParams(temperature=1.1, seed=2, top_p=0.9, top_k=50, max_tokens=25, logprobs=2)),
    _Job([40, 41, 7], SamplingParams(temperature=0.8, seed=3, frequency_penalty=0.7, max_tokens=9, ignore_eos=True)),
    _Job([100], SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=12, ignore_eos=True)),
    _Job([100, 101], SamplingParams(n=2, use_beam_search=True, temperature=0.0, seed=5, max_tokens=8)),
    _Job([7, 7], SamplingParams(temperature=1.0, seed=6, max_tokens=40, stop_token_ids=list(range(0, 300, 9)))),
)


def _run_jobs(folder: Path, run_ahead: str) -> tuple[dict[str, dict[int, list[int]]], int]:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        num_threads=1,
        kv_cache_memory=0.02,
        max_num_seqs=8,
        op_provider="torch",
        attention_backend="torch",
        run_ahead=run_ahead,
    )
    core = EngineCore(config)
    num_following = 0
    submit = core._executor.submit

    def count(step: Step):  # type: ignore[no-untyped-def]
        nonlocal num_following
        num_following += step.follows
        return submit(step)

    core._executor.submit = count  # type: ignore[method-assign]
    outputs: dict[str, dict[int, list[int]]] = {}
    waiting = deque(enumerate(JOBS))
    clock = 0
    while waiting or core.has_unfinished:
        if waiting and clock % 3 == 0:
            number, job = waiting.popleft()
            core.add(
                EngineRequest(request_id=str(number), prompt_token_ids=job.prompt, params=job.params, arrival_s=float(number))
            )
        for update in core.step():
            assert update.error is None
            for sequence in update.sequences:
                outputs.setdefault(update.request_id, {}).setdefault(sequence.index, []).extend(sequence.new_token_ids)
        core.scheduler.check()
        clock += 1
    core.close()
    return outputs, num_following


def test_a_stop_string_ends_a_text_while_a_step_for_it_is_on_its_way(tiny_llama: Path) -> None:
    texts = []
    for run_ahead in ("never", "always"):
        llm = LLM(str(tiny_llama), dtype="float32", device="cpu", run_ahead=run_ahead, max_num_seqs=2, kv_cache_memory=0.02)
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=30, stop=["e", "in"], ignore_eos=True)
        outputs = llm.generate(["The state", "Hello", "The capital of", "def add"], params, use_tqdm=False)
        assert llm.stats().num_free_blocks + llm.stats().num_cached_blocks == llm.stats().num_blocks
        texts.append([output.outputs[0].text for output in outputs])
        llm.close()
    assert texts[0] == texts[1]


def test_a_real_model_gives_the_same_tokens_when_steps_follow_others(tiny_llama: Path) -> None:
    expected, none = _run_jobs(tiny_llama, "never")
    outputs, many = _run_jobs(tiny_llama, "always")
    assert outputs == expected
    assert none == 0
    assert many >= 10
