"""`LLM` on real (tiny) models, against Hugging Face transformers on the same weights, in float32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheflow import LLM, RequestOutput, SamplingParams
from cacheflow.errors import ConfigError, InvalidRequestError, NotEnoughMemoryError, RequestFailedError
from cacheflow.llm import GenerationInterrupted

PROMPTS = [
    "The president of the United States is",
    "The capital of France is Paris, and",
    "Hello, my name is",
    "San Francisco is a city in the state of California, in the west",
    "There are 12 months",
    "def add(a, b):",
    "The future",
    "a",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(model=str(tiny_llama), dtype="float32", kv_cache_memory=0.05) as engine:
        yield engine


@pytest.fixture(scope="module")
def twin(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def token_ids_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def generate_with_twin(twin: Any, prompt_ids: list[int], **options: Any) -> list[list[int]]:
    with torch.inference_mode():
        sequences = twin.generate(torch.tensor([prompt_ids]), do_sample=False, pad_token_id=1, **options)
    return [row[len(prompt_ids) :].tolist() for row in sequences]


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_opt"])
def test_greedy_tokens_equal_those_of_transformers(fixture: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(fixture)
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with LLM(model=str(folder), dtype="float32", kv_cache_memory=0.05) as engine:
        outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    for output in outputs:
        expected = generate_with_twin(twin, output.prompt_token_ids, max_new_tokens=12, min_new_tokens=12, eos_token_id=None)
        assert token_ids_of(output) == expected[0]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length_penalty", [1.0, 0.6])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_beam_search_gives_the_beams_of_transformers_in_their_order(
    llm: LLM, twin: Any, width: int, length_penalty: float, early_stopping: bool
) -> None:
    rng = random.Random(width)
    prompts = [[rng.randrange(4, 301) for _ in range(rng.randint(1, 40))] for _ in range(20)]
    # Ids that the tiny model likes, besides its own end of text, so that beams finish early.
    likely = llm.generate(prompt_token_ids=prompts[:2], sampling_params=GREEDY, use_tqdm=False)
    stop_ids = [token for output in likely for token in sorted(set(token_ids_of(output)))[:8]]
    params = SamplingParams(
        n=width,
        use_beam_search=True,
        temperature=0.0,
        max_tokens=12,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop_token_ids=stop_ids,
    )
    num_finished_early = 0
    for output in llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False):
        expected = generate_with_twin(
            twin,
            output.prompt_token_ids,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=12,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=sorted({2, *stop_ids}),
        )
        without_padding = [trimmed(tokens, {2, *stop_ids}) for tokens in expected]
        assert [c.token_ids for c in output.outputs] == without_padding
        assert [c.text for c in output.outputs] == [shown_text(llm, tokens, {2, *stop_ids}) for tokens in without_padding]
        num_finished_early += sum(c.finish_reason == "stop" for c in output.outputs)
    assert num_finished_early > 10


def trimmed(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Without what transformers pads finished beams with."""
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: position + 1]
    return tokens


def shown_text(llm: LLM, tokens: list[int], stop_ids: set[int]) -> str:
    return llm.tokenizer.decode(tokens[:-1] if tokens[-1] in stop_ids else tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 3, "max_num_seqs": 3},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"enable_prefix_caching": False},
        {"block_size": 1},
        {"block_size": 7},
        {"scheduling_policy": "fair"},
        {"max_num_seqs": 2},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_how_they_are_scheduled(llm: LLM, tiny_llama: Path, options: dict[str, Any]) -> None:
    prompts = PROMPTS[-4:]
    expected = [token_ids_of(o) for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    with LLM(model=str(tiny_llama), dtype="float32", kv_cache_memory=0.05, **options) as engine:
        for _ in range(2):  # the second time from the prefix cache
            assert [token_ids_of(o) for o in engine.generate(prompts, GREEDY, use_tqdm=False)] == expected


def test_preempted_requests_give_the_same_tokens(llm: LLM, tiny_llama: Path) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, n=1 + i % 3) for i in range(8)]
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    with LLM(model=str(tiny_llama), dtype="float32", kv_cache_memory=0.00072, max_model_len=200, block_size=8) as engine:
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
        assert engine.stats().num_preemptions > 0
    assert [[c.token_ids for c in o.outputs] for o in outputs] == [[c.token_ids for c in o.outputs] for o in expected]


def test_a_request_is_alone_what_it_is_in_a_batch(llm: LLM) -> None:
    params = [SamplingParams(temperature=1.0, seed=i, n=2, max_tokens=10, top_p=0.9) for i in range(len(PROMPTS))]
    batch = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, one, output in zip(PROMPTS, params, batch, strict=True):
        alone = llm.generate(prompt, one, use_tqdm=False)[0]
        assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in output.outputs]


def test_the_engine_seed_makes_unseeded_runs_repeatable(tiny_llama: Path) -> None:
    def run(seed: int) -> list[list[int]]:
        with LLM(str(tiny_llama), dtype="float32", seed=seed, kv_cache_memory=0.05) as engine:
            outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=8), use_tqdm=False)
        return [token_ids_of(o) for o in outputs]

    assert run(1) == run(1) != run(2)


def test_logprobs_are_the_models_own_whatever_shapes_the_choice(llm: LLM, twin: Any) -> None:
    params = replace(GREEDY, logprobs=3, prompt_logprobs=2, frequency_penalty=1.5, temperature=0.0)
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    completion = output.outputs[0]
    ids = output.prompt_token_ids + completion.token_ids
    with torch.inference_mode():
        expected = torch.log_softmax(twin(torch.tensor([ids])).logits[0], dim=-1)
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    entries = output.prompt_logprobs[1:] + completion.logprobs
    for position, (entry, token) in enumerate(zip(entries, ids[1:], strict=True)):
        assert entry is not None and next(iter(entry)) == token
        for candidate, logprob in entry.items():
            assert logprob == pytest.approx(expected[position, candidate].item(), abs=1e-4)
        top = expected[position].topk(2).indices.tolist()
        assert set(top) <= entry.keys()
    chosen = sum(entry[token] for entry, token in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(chosen, abs=1e-4)


def test_best_of_returns_the_likeliest_per_token(llm: LLM) -> None:
    params = SamplingParams(n=2, best_of=5, seed=3, max_tokens=8, temperature=1.5)
    best = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs
    everything = llm.generate(PROMPTS[0], replace(params, n=5), use_tqdm=False)[0].outputs
    ranked = sorted(everything, key=lambda c: c.cumulative_logprob / len(c.token_ids), reverse=True)
    assert [c.token_ids for c in best] == [c.token_ids for c in ranked[:2]]
    assert [c.index for c in best] == [0, 1]


def test_streamed_text_grows_to_the_text_of_generate(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=30, n=2, stop=["e"], min_tokens=3)
    whole = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    seen = ["", ""]
    for output in llm.stream(PROMPTS[0], params):
        for completion in output.outputs:
            assert completion.text.startswith(seen[completion.index])
            seen[completion.index] = completion.text
    assert seen == [c.text for c in whole.outputs]
    assert output.finished
    assert output.outputs == whole.outputs


def test_streams_taken_in_turns_keep_their_tokens_apart(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    expected = [token_ids_of(output) for output in llm.generate(PROMPTS[:3], params, use_tqdm=False)]
    streams = [llm.stream(prompt, params) for prompt in PROMPTS[:2]]
    last: list[RequestOutput | None] = [None, None]
    for turn in range(40):
        last[turn % 2] = next(streams[turn % 2], last[turn % 2])
        if turn == 5:
            assert token_ids_of(llm.generate(PROMPTS[2], params, use_tqdm=False)[0]) == expected[2]
    assert [token_ids_of(output) for output in last if output] == expected[:2]
    assert llm.stats().num_running == 0


def test_leaving_a_stream_early_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.stats().num_running == 1
    stream.close()
    assert llm.stats().num_running == 0


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=20 - 2 * i, ignore_eos=True) for i in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == PROMPTS
    assert [len(token_ids_of(o)) for o in outputs] == [20 - 2 * i for i in range(len(PROMPTS))]


def test_a_bad_prompt_does_not_lose_the_others(llm: LLM) -> None:
    outputs = llm.generate(["", PROMPTS[0], "x " * 2000], GREEDY, use_tqdm=False)
    assert "empty" in str(outputs[0].error) and "2" in str(outputs[2].error)
    assert outputs[1].error is None and len(token_ids_of(outputs[1])) == 12
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(["", PROMPTS[0]], GREEDY, use_tqdm=False, raise_errors=True)
    assert llm.stats().num_running == llm.stats().num_waiting == 0


@pytest.mark.parametrize(
    ("token_ids", "params", "message"),
    [
        ([5, 301], {}, r"301.*from 0 to 300"),
        ([5, -1], {}, r"-1.*from 0 to 300"),
        ([5] * 512, {}, r"512 tokens.*511"),
        ([5], {"logit_bias": {301: 1.0}}, r"logit_bias.*301"),
        ([5], {"stop_token_ids": [999]}, r"stop_token_ids.*999"),
        ([5], {"allowed_token_ids": [999]}, r"allowed_token_ids.*999"),
    ],
)
def test_bad_ids_and_lengths_are_refused_with_their_numbers(
    llm: LLM, token_ids: list[int], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompt_token_ids=[token_ids], sampling_params=SamplingParams(**params), use_tqdm=False, raise_errors=True)


def test_a_request_that_can_never_fit_is_refused_at_once(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), dtype="float32", kv_cache_memory=0.0005, max_model_len=256) as engine:
        output = engine.generate(PROMPTS[0], SamplingParams(n=100, max_tokens=200), use_tqdm=False)[0]
    assert "KV blocks" in str(output.error) and "--kv-cache-memory" in str(output.error)


def test_too_little_memory_for_the_kv_cache_says_what_to_change(tiny_llama: Path) -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"--kv-cache-memory.*"):
        LLM(str(tiny_llama), dtype="float32", kv_cache_memory=0.00001)


def test_unknown_options_are_named_with_the_closest_one(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq.*max_num_seqs"):
        LLM(str(tiny_llama), max_num_seq=3)


def test_nothing_that_may_be_chosen_fails_that_request_alone(llm: LLM) -> None:
    banned = SamplingParams(allowed_token_ids=[7], logit_bias={7: -100.0}, max_tokens=3)
    impossible = SamplingParams(allowed_token_ids=[2], min_tokens=2, max_tokens=3)
    outputs = llm.generate(PROMPTS[:3], [GREEDY, impossible, banned], use_tqdm=False)
    assert [o.error is None for o in outputs] == [True, False, True]
    assert token_ids_of(outputs[2]) == [7, 7, 7]
    with pytest.raises((InvalidRequestError, RequestFailedError)):
        list(llm.stream(PROMPTS[0], impossible))


@pytest.mark.parametrize("place", ["schedule", "submit", "apply"])
def test_ctrl_c_keeps_what_has_finished_and_the_llm_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    expected = token_ids_of(llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0])
    owner: Any = llm._core._executor if place == "submit" else llm._core.scheduler
    work = getattr(owner, place)
    num_calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        result = work(*arguments, **options)
        if num_calls == 5:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, place, interrupted)
    params = [replace(GREEDY, max_tokens=3), replace(GREEDY, max_tokens=60)]
    with pytest.raises(GenerationInterrupted) as caught:
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
    first, second = caught.value.outputs
    assert first is not None and len(token_ids_of(first)) == 3
    assert second is None
    monkeypatch.undo()
    stats = llm.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
    assert token_ids_of(llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0]) == expected


def test_arguments_of_the_wrong_kind_are_refused_by_name(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params must be"):
        llm.generate(PROMPTS[0], {"temperature": 0}, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="list of lists of token ids"):
        llm.generate(prompt_token_ids=[[4, 5], 5], use_tqdm=False)  # type: ignore[list-item]
