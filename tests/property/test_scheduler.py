"""Whatever the limits, the arrivals, the aborts and the preemptions: the same tokens, and nothing lost."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import EOS, VOCAB_SIZE, Result, SimulatedExecutor, next_scores, next_token

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.errors import EngineDeadError, InvalidRequestError, OutOfMemoryError
from cacheflow.interfaces import RequestView, Sample, Step, StepOutput
from cacheflow.scheduling.beam_search import BeamSearch
from cacheflow.scheduling.policies import Fair
from cacheflow.scheduling.sequence import Sequence
from cacheflow.types import EngineRequest, RequestUpdate, ResumedSequence, SamplingParams

MAX_MODEL_LEN = 96


def make_request(
    name: str, prompt: list[int], params: SamplingParams, *, client: str = "", arrival: float = 0.0
) -> EngineRequest:
    return EngineRequest(request_id=name, client_id=client, prompt_token_ids=prompt, params=params, arrival_s=arrival)


def expected_outputs(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """What each sequence must be, computed without any engine."""
    limit = min(params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(prompt))
    if params.use_beam_search:
        return expected_beams(prompt, params, limit)
    outputs = []
    for index in range(params.num_sequences):
        output: list[int] = []
        while len(output) < limit:
            output.append(next_token([*prompt, *output], index))
            if output[-1] == EOS and len(output) > params.min_tokens and not params.ignore_eos:
                break
        outputs.append(output)
    return outputs


def expected_beams(prompt: list[int], params: SamplingParams, limit: int) -> list[list[int]]:
    stop = frozenset() if params.ignore_eos else frozenset({EOS})
    search = BeamSearch(params.num_sequences, params.length_penalty, params.early_stopping, limit, stop)
    beams = [Sequence(id=0, index=0, token_ids=list(prompt))]
    while not search.is_done:
        samples = []
        for beam in beams:
            scores = next_scores(beam.token_ids)
            best = sorted(range(VOCAB_SIZE), key=lambda t: -scores[t])[: search.num_candidates]
            chosen = [scores[t] for t in best]
            samples.append(Sample(token_ids=best, scores=chosen, logprobs=chosen))
        children = []
        for continuation in search.advance(beams, samples):
            child = beams[continuation.parent].fork(0, 0)
            child.append(continuation.token_id, continuation.logprob)
            child.score = continuation.score
            children.append(child)
        beams = children
    return [h.token_ids for h in search.finished]


def collect(outputs: dict[str, dict[int, list[int]]], updates: list[RequestUpdate]) -> set[str]:
    """Adds updates to what was received so far; returns the requests that finished."""
    for update in updates:
        for sequence in update.sequences:
            outputs.setdefault(update.request_id, {}).setdefault(sequence.index, []).extend(sequence.new_token_ids)
    return {u.request_id for u in updates if u.finished}


def accepted(core: EngineCore, request: EngineRequest) -> bool:
    """Whether the engine takes a request that may be too large for it."""
    try:
        core.add(request)
    except InvalidRequestError:
        return False
    return True


@dataclass
class Failed(Result):
    """A step that ends in an exception, Ctrl-C's included."""

    error: BaseException = field(kw_only=True)

    def result(self) -> StepOutput:
        raise self.error


prompts = st.lists(st.integers(8, 11), min_size=1, max_size=40)
parameters = st.builds(
    lambda n, max_tokens, beam, ignore_eos, penalty, early: SamplingParams(
        n=n,
        max_tokens=max_tokens,
        use_beam_search=beam and n > 1,
        temperature=0.0,
        ignore_eos=ignore_eos,
        length_penalty=penalty,
        early_stopping=early,
    ),
    st.integers(1, 4),
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.6, 1.0]),
    st.sampled_from([True, False, "never"]),
)


def make_core(num_blocks: int, block_size: int, budget: int, seats: int, **options: object) -> EngineCore:
    poison = options.pop("poison", -1)
    config = EngineConfig(block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=min(seats, budget), **options)
    executor = SimulatedExecutor(num_blocks, block_size, budget, poison=poison, max_model_len=MAX_MODEL_LEN)
    return EngineCore(config, executor)


@settings(max_examples=200, deadline=None)
@given(
    work=st.lists(st.tuples(prompts, parameters, st.integers(0, 6)), min_size=1, max_size=8),
    num_blocks=st.integers(20, 60),
    block_size=st.sampled_from([1, 4, 5, 16]),
    budget=st.integers(4, 40),
    seats=st.integers(4, 12),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
)
def test_every_accepted_request_gets_its_own_tokens(
    work: list[tuple[list[int], SamplingParams, int]],
    num_blocks: int,
    block_size: int,
    budget: int,
    seats: int,
    caching: bool,
    policy: str,
) -> None:
    core = make_core(num_blocks, block_size, budget, seats, enable_prefix_caching=caching, scheduling_policy=policy)
    outputs: dict[str, dict[int, list[int]]] = {}
    expected: dict[str, list[list[int]]] = {}
    finished: set[str] = set()
    arrivals = sorted(enumerate(work), key=lambda item: item[1][2])
    for clock in range(4000):
        while arrivals and arrivals[0][1][2] <= clock:
            number, (prompt, params, arrival) = arrivals.pop(0)
            if accepted(core, make_request(str(number), prompt, params, client=str(number % 3), arrival=arrival)):
                expected[str(number)] = expected_outputs(prompt, params)
        if not arrivals and not core.has_unfinished:
            break
        finished |= collect(outputs, core.step())
        core.scheduler.check()
    assert finished == expected.keys()
    assert {name: [got[i] for i in sorted(got)] for name, got in outputs.items()} == expected
    stats = core.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == num_blocks


@settings(max_examples=200, deadline=None)
@given(
    work=st.lists(st.tuples(prompts, parameters), min_size=2, max_size=8),
    aborts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 7), st.none() | st.integers(0, 3)), max_size=6),
    num_blocks=st.integers(20, 40),
)
def test_an_abort_frees_its_blocks_and_leaves_the_others_alone(
    work: list[tuple[list[int], SamplingParams]], aborts: list[tuple[int, int, int | None]], num_blocks: int
) -> None:
    core = make_core(num_blocks, 4, 16, 8)
    outputs: dict[str, dict[int, list[int]]] = {}
    expected: dict[str, list[list[int]]] = {}
    for number, (prompt, params) in enumerate(work):
        if accepted(core, make_request(str(number), prompt, params, arrival=number)):
            expected[str(number)] = expected_outputs(prompt, params)
    aborted: set[str] = set()
    finished: set[str] = set()
    for clock in range(4000):
        for when, number, index in aborts:
            if when == clock and str(number) in expected:
                core.abort(str(number), index=index)
                aborted.add(str(number))
                core.scheduler.check()
        if not core.has_unfinished:
            break
        finished |= collect(outputs, core.step())
        core.scheduler.check()
    assert not core.has_unfinished
    for name in expected.keys() - aborted:
        assert [outputs[name][i] for i in sorted(outputs[name])] == expected[name]
    for name in aborted & outputs.keys():
        for index, tokens in outputs[name].items():
            assert tokens == expected[name][index][: len(tokens)]
    assert core.stats().num_free_blocks + core.stats().num_cached_blocks == num_blocks


operations = st.one_of(
    st.tuples(st.just("generate"), prompts, parameters, st.integers(0, 2)),
    st.tuples(st.just("embed"), prompts, st.just(None), st.integers(0, 2)),
    st.tuples(st.just("resumed"), prompts, st.integers(1, 4), st.integers(0, 2)),
    st.tuples(st.just("abort"), st.integers(0, 30), st.none() | st.integers(0, 3), st.just(0)),
    st.tuples(st.sampled_from(["step", "step", "step", "out of memory", "interrupt"]), st.just(0), st.just(0), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(
    work=st.lists(operations, max_size=60),
    num_blocks=st.integers(12, 40),
    budget=st.integers(4, 30),
    policy=st.sampled_from(["fcfs", "fair"]),
)
def test_counts_kept_along_the_way_are_what_counting_anew_gives(
    work: list[tuple[str, Any, Any, int]], num_blocks: int, budget: int, policy: str
) -> None:
    core = make_core(num_blocks, 4, budget, 6, poison=3, scheduling_policy=policy)
    execute = core._executor.submit
    failures: list[BaseException] = []

    def submit(step: Step) -> Result:
        result = execute(step)
        return Failed(result.output, error=failures.pop()) if failures else result

    core._executor.submit = submit  # type: ignore[assignment, method-assign]
    for number, (operation, prompt, detail, client) in enumerate(work):
        if operation in ("generate", "embed", "resumed"):
            params = detail if operation == "generate" else SamplingParams(n=detail or 1, max_tokens=9, ignore_eos=True)
            source = make_request(str(number), prompt, params, client=str(client), arrival=number)
            if operation == "embed":
                source = replace(source, task="embed")
            if operation == "resumed":
                outputs = [
                    ResumedSequence(index=i, token_ids=expected_outputs(prompt, params)[i][: i + 1], cumulative_logprob=0.0)
                    for i in range(detail)
                ]
                source = replace(source, resumed=outputs)
            accepted(core, source)
        elif operation == "abort":
            for name in "012":
                core.abort(str(prompt), name, detail)
        else:
            failures[:] = {"out of memory": [OutOfMemoryError("full")], "interrupt": [KeyboardInterrupt()]}.get(operation, [])
            with contextlib.suppress(KeyboardInterrupt):
                core.step()
        core.scheduler.check()
    failures.clear()
    for _ in range(4000):
        if not core.has_unfinished:
            break
        core.step()
        core.scheduler.check()
    assert not core.has_unfinished
    scheduler = core.scheduler
    assert scheduler.num_waiting_tokens == scheduler.num_unfinished_sequences == scheduler._num_seats_taken == 0
    assert core.stats().num_free_blocks + core.stats().num_cached_blocks == num_blocks


@settings(max_examples=200, deadline=None)
@given(work=st.lists(st.tuples(prompts, parameters), min_size=1, max_size=7), culprits=st.sets(st.integers(0, 6), max_size=2))
def test_a_request_that_makes_steps_fail_fails_alone(work: list[tuple[list[int], SamplingParams]], culprits: set[int]) -> None:
    core = make_core(60, 4, 24, 12, poison=3)
    outputs: dict[str, dict[int, list[int]]] = {}
    expected: dict[str, list[list[int]]] = {}
    failed: set[str] = set()
    for number, (prompt, params) in enumerate(work):
        prompt = [3, *prompt] if number in culprits else prompt
        if accepted(core, make_request(str(number), prompt, params, arrival=number)):
            expected[str(number)] = expected_outputs(prompt, params)
    for _ in range(4000):
        if not core.has_unfinished:
            break
        updates = core.step()
        failed |= {u.request_id for u in updates if u.error}
        collect(outputs, [u for u in updates if not u.error])
        core.scheduler.check()
    assert failed == {name for name in expected if int(name) in culprits}
    for name in expected.keys() - failed:
        assert [outputs[name][i] for i in sorted(outputs[name])] == expected[name]
    assert core.stats().num_free_blocks + core.stats().num_cached_blocks == 60


@settings(max_examples=100, deadline=None)
@given(work=st.lists(st.tuples(prompts, parameters), min_size=1, max_size=6), num_steps=st.integers(1, 25))
def test_requests_go_on_in_a_new_engine_where_the_old_one_died(
    work: list[tuple[list[int], SamplingParams]], num_steps: int
) -> None:
    core = make_core(60, 4, 24, 12)
    sources: dict[str, EngineRequest] = {}
    outputs: dict[str, dict[int, list[int]]] = {}
    finished: set[str] = set()
    ended: set[tuple[str, int]] = set()
    for number, (prompt, params) in enumerate(work):
        source = make_request(str(number), prompt, params, arrival=number)
        if accepted(core, source):
            sources[str(number)] = source
    for _ in range(num_steps):
        updates = core.step()
        finished |= collect(outputs, updates)
        ended |= {(u.request_id, s.index) for u in updates for s in u.sequences if s.finish_reason}
    successor = make_core(60, 4, 24, 12)
    for name in sources.keys() - finished:
        resumed = [
            ResumedSequence(index=i, token_ids=list(tokens), cumulative_logprob=-1.0, is_finished=(name, i) in ended)
            for i, tokens in outputs.get(name, {}).items()
        ]
        successor.add(replace(sources[name], resumed=resumed))
    for _ in range(4000):
        if not successor.has_unfinished:
            break
        finished |= collect(outputs, successor.step())
        successor.scheduler.check()
    assert finished == sources.keys()
    for name, source in sources.items():
        expected = expected_outputs(source.prompt_token_ids, source.params)
        assert [outputs[name][i] for i in sorted(outputs[name])] == expected


@pytest.mark.parametrize(
    "resumed",
    [
        [ResumedSequence(index=0, token_ids=[8], cumulative_logprob=0.0)],
        [ResumedSequence(index=i, token_ids=[8], cumulative_logprob=0.0, is_finished=True) for i in range(2)],
        [ResumedSequence(index=i, token_ids=[], cumulative_logprob=0.0) for i in range(2)],
        [ResumedSequence(index=i, token_ids=[8] * 5, cumulative_logprob=0.0) for i in range(2)],
        [ResumedSequence(index=i, token_ids=[999], cumulative_logprob=0.0) for i in range(2)],
    ],
    ids=["one is missing", "all have finished", "no tokens", "no room", "no such id"],
)
def test_a_resumed_request_that_does_not_add_up_is_refused(resumed: list[ResumedSequence]) -> None:
    core = make_core(40, 4, 8, 8)
    source = make_request("a", [8], SamplingParams(n=2, max_tokens=5, ignore_eos=True))
    with pytest.raises(InvalidRequestError, match="resumed"):
        core.add(replace(source, resumed=resumed))
    assert not core.has_unfinished


def test_aborted_requests_behind_a_blocked_one_are_forgotten() -> None:
    core = make_core(40, 4, 8, 1)
    core.add(make_request("running", [8], SamplingParams(max_tokens=50, ignore_eos=True)))
    core.step()
    for number in range(1000):
        core.add(make_request(str(number), [8] * 20, SamplingParams(), arrival=number))
        if number:
            core.abort(str(number))
    assert core.stats().num_waiting == 1
    assert len(core.scheduler._waiting) < 10


def test_fair_looks_at_what_it_remembers_seldom_when_all_of_it_waits() -> None:
    policy = Fair()
    forget, num_times = policy._forget_rounds_below, 0

    def count(turn: int) -> None:
        nonlocal num_times
        num_times += 1
        forget(turn)

    policy._forget_rounds_below = count  # type: ignore[method-assign]
    core = make_core(40, 4, 8, 1)
    core.scheduler._policy = policy
    for number in range(20_000):
        core.add(make_request(str(number), [8], SamplingParams(max_tokens=2)))
    assert num_times < 5


@pytest.mark.parametrize("num_clients", [1, 20_000])
def test_fair_forgets_clients(num_clients: int) -> None:
    policy = Fair()
    for index in range(20_000):
        view = RequestView(
            request_id="r",
            client_id=str(index % num_clients),
            priority=0,
            arrival_s=index,
            arrival_index=index,
            num_prompt_tokens=1,
            num_output_tokens=0,
            num_sequences=1,
        )
        policy.key(view)
        policy.chunk(view, 1)
    assert len(policy._last_round) + len(policy._round_of) <= 2 * 4096


def test_a_worker_that_is_gone_is_not_blamed_on_requests() -> None:
    core = make_core(40, 4, 8, 8, poison=3)

    def check() -> None:
        raise EngineDeadError("gone")

    core._executor.check = check  # type: ignore[method-assign]
    core.add(make_request("a", [3, 8], SamplingParams(max_tokens=50, ignore_eos=True)))
    with pytest.raises(EngineDeadError):
        core.step()
    assert core.has_unfinished


def test_fair_makes_a_request_for_four_sequences_take_four_turns() -> None:
    core = make_core(100, 4, 64, 4, scheduling_policy="fair")
    for number in range(8):
        params = SamplingParams(max_tokens=2, ignore_eos=True, n=4 if number < 2 else 1)
        client = "wide" if number < 2 else "narrow"
        core.add(make_request(str(number), [8 + number], params, client=client, arrival=number))
    order: list[str] = []
    while core.has_unfinished:
        order += [u.request_id for u in core.step() if u.finished]
    assert order.index("1") > order.index("5")


def test_first_come_is_first_served_under_pressure() -> None:
    core = make_core(12, 4, 16, 8)
    for number in range(6):
        core.add(
            make_request(
                str(number), [8 + number] * 15, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True), arrival=number
            )
        )
    order: list[str] = []
    while core.has_unfinished:
        order += [u.request_id for u in core.step() if u.finished]
    assert order == sorted(order)


def test_prompt_scores_come_once_and_for_every_position() -> None:
    core = make_core(40, 4, 8, 8)
    prompt = [8, 9, 10] * 7
    core.add(make_request("warm", prompt, SamplingParams(max_tokens=1)))
    while core.has_unfinished:
        core.step()
    core.add(make_request("scored", prompt, SamplingParams(max_tokens=3, prompt_logprobs=0, ignore_eos=True, n=2)))
    scores = []
    while core.has_unfinished:
        for update in core.step():
            scores += update.new_prompt_logprobs or []
            assert update.num_cached_tokens == 0
    assert scores == [None] + [{token: -float(i)} for i, token in enumerate(prompt) if i]


def test_a_one_token_prompt_has_one_empty_score() -> None:
    core = make_core(40, 4, 8, 8)
    core.add(make_request("one", [8], SamplingParams(max_tokens=2, prompt_logprobs=1, ignore_eos=True)))
    scores = []
    while core.has_unfinished:
        for update in core.step():
            scores += update.new_prompt_logprobs or []
    assert scores == [None]


def test_requests_of_one_step_share_the_blocks_that_it_computes() -> None:
    core = make_core(60, 4, 200, 8)
    for name in "ab":
        core.add(make_request(name, [8] * 41, SamplingParams(max_tokens=2, ignore_eos=True)))
    updates = core.step()
    assert {u.request_id: u.num_cached_tokens for u in updates} == {"a": 0, "b": 40}


def test_salts_keep_tenants_apart() -> None:
    core = make_core(60, 4, 200, 8)
    for name in "ab":
        source = make_request(name, [8] * 41, SamplingParams(max_tokens=2, ignore_eos=True))
        core.add(EngineRequest(**{**source.__dict__, "cache_salt": name}))
    assert [u.num_cached_tokens for u in core.step()] == [0, 0]


def test_fair_takes_turns_between_clients() -> None:
    core = make_core(60, 4, 64, 1, scheduling_policy="fair")
    for number in range(6):
        client = "greedy" if number < 4 else "modest"
        core.add(
            make_request(
                str(number), [8 + number], SamplingParams(max_tokens=2, ignore_eos=True), client=client, arrival=number
            )
        )
    order: list[str] = []
    while core.has_unfinished:
        order += [u.request_id for u in core.step() if u.finished]
    assert order == ["0", "4", "1", "5", "2", "3"]
