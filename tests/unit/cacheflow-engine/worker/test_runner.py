"""The runner on a tiny Llama: whole prompts, chunks and a Hugging Face twin agree."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheflow.config import EngineConfig
from cacheflow.errors import ConfigError, NotEnoughMemoryError
from cacheflow.interfaces import Sample, SampleSpec, ScheduledSequence, Step
from cacheflow.sampling import logprobs
from cacheflow.types import SamplingParams
from cacheflow.worker.runner import Runner

BLOCKS = {0: [9, 2, 14, 5], 1: [0, 11, 3, 7], 2: [1, 4, 6, 8]}
PROMPTS = {0: [40, 7, 200, 91, 17, 33, 8, 250, 60], 1: list(range(20, 57)), 2: [5]}
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=16, logprobs=3)
DRAWN = SamplingParams(temperature=1.2, top_p=0.9, seed=3, max_tokens=16, repetition_penalty=1.2)


def _config(folder: Path, **changes: Any) -> EngineConfig:
    options = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 0.005, "max_num_seqs": 4, "max_model_len": 64}
    return EngineConfig(model=str(folder), num_threads=1, **{**options, **changes})


@pytest.fixture(scope="module")
def runner(tiny_llama: Path) -> Runner:
    return Runner(_config(tiny_llama))


@pytest.fixture(scope="module")
def twin(tiny_llama: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        yield AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def _spec(i: int, params: SamplingParams, output: Sequence[int], index: int = 0) -> SampleSpec:
    return SampleSpec(
        sequence_id=i,
        request_index=i,
        index=index,
        params=params,
        prompt_token_ids=PROMPTS[i],
        output_token_ids=list(output),
    )


def _scheduled(i: int, tokens: Sequence[int], num_computed: int, *specs: SampleSpec, **scoring: Any) -> ScheduledSequence:
    return ScheduledSequence(
        sequence_id=i,
        token_ids=list(tokens),
        num_computed_tokens=num_computed,
        block_table=BLOCKS[i],
        samples=specs,
        **scoring,
    )


def _generate(
    runner: Runner, sequences: Sequence[int], chunk: int, params: SamplingParams, num_tokens: int = 5
) -> dict[int, list[Sample]]:
    """Runs sequences together, their prompts in chunks, to `num_tokens` each."""
    samples: dict[int, list[Sample]] = {i: [] for i in sequences}
    computed = dict.fromkeys(sequences, 0)
    while any(len(made) < num_tokens for made in samples.values()):
        parts = []
        for i in (i for i in sequences if len(samples[i]) < num_tokens):
            output = [sample.token_ids[0] for sample in samples[i]]
            tokens = (PROMPTS[i] + output)[computed[i] : computed[i] + chunk]
            is_last = computed[i] + len(tokens) == len(PROMPTS[i]) + len(output)
            parts.append(_scheduled(i, tokens, computed[i], *([_spec(i, params, output)] if is_last else [])))
            computed[i] += len(tokens)
        for part, made in zip(parts, runner.execute(Step(sequences=tuple(parts))).samples, strict=True):
            samples[part.sequence_id] += made
    runner.execute(Step(sequences=(), finished_requests=tuple(sequences)))
    return samples


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_tokens_do_not_depend_on_chunks_or_company(runner: Runner, params: SamplingParams) -> None:
    whole = {i: _generate(runner, [i], 64, params)[i] for i in PROMPTS}
    for chunk in (64, 1, 3, 7):
        together = _generate(runner, list(PROMPTS), chunk, params)
        for i in PROMPTS:
            assert [s.token_ids for s in together[i]] == [s.token_ids for s in whole[i]]
            for a, b in zip(together[i], whole[i], strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_greedy_tokens_and_logprobs_are_the_twins(runner: Runner, twin: Any) -> None:
    for i, prompt in PROMPTS.items():
        tokens = list(prompt)
        for sample in _generate(runner, [i], 4, GREEDY)[i]:
            expected = twin(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            token = int(expected.argmax())
            assert sample.token_ids == [token]
            assert sample.logprobs[0] == pytest.approx(expected[token].item(), abs=1e-4)
            assert sample.top_logprobs is not None
            assert list(sample.top_logprobs[0]) == expected.topk(3).indices.tolist()
            tokens.append(token)


@pytest.mark.parametrize("chunk", [64, 5])
def test_prompt_logprobs_are_the_twins(runner: Runner, twin: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "MAX_SLICE_ELEMENTS", 4 * 301)
    prompt = PROMPTS[1]
    entries = []
    for start in range(0, len(prompt), chunk):
        part = _scheduled(
            1,
            prompt[start : start + chunk],
            start,
            num_prompt_logprobs=2,
            scored_token_ids=prompt[start + 1 : start + chunk + 1],
        )
        (found,) = runner.execute(Step(sequences=(part,))).prompt_logprobs
        assert found is not None
        entries += found
    expected = twin(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(entries) == len(prompt) - 1
    for row, (token, entry) in enumerate(zip(prompt[1:], entries, strict=True)):
        assert list(entry)[0] == token
        assert set(entry) == {token, *expected[row].topk(2).indices.tolist()}
        assert list(entry.values()) == pytest.approx([expected[row, key].item() for key in entry], abs=1e-4)


def test_results_come_in_the_steps_order(runner: Runner) -> None:
    parts = [_scheduled(i, PROMPTS[i], 0, *[_spec(i, DRAWN, [], k) for k in range(i)]) for i in PROMPTS]
    forwards = runner.execute(Step(sequences=tuple(parts)))
    backwards = runner.execute(Step(sequences=tuple(parts[::-1]), finished_requests=tuple(PROMPTS)))
    assert [len(samples) for samples in forwards.samples] == [0, 1, 2]
    assert [[s.token_ids for s in own] for own in forwards.samples] == [
        [s.token_ids for s in own] for own in backwards.samples[::-1]
    ]
    assert forwards.prompt_logprobs == [None, None, None]


def test_blocks_are_copied_before_anything_is_written(runner: Runner) -> None:
    prompt = PROMPTS[1]
    expected = _generate(runner, [1], 64, GREEDY, num_tokens=1)[1]
    fork = ScheduledSequence(
        sequence_id=7,
        token_ids=prompt[-1:],
        num_computed_tokens=len(prompt) - 1,
        block_table=[12, 13, 10],
        samples=(_spec(1, GREEDY, []),),
    )
    step = Step(sequences=(fork,), copies=((0, 12), (11, 13), (3, 10)), finished_requests=(1,))
    assert runner.execute(step).samples[0][0].token_ids == expected[0].token_ids


def test_the_capacity_names_the_model_and_its_limits(runner: Runner, tiny_llama: Path) -> None:
    info = runner.capacity.info
    assert (info.model, info.architecture, info.dtype) == (str(tiny_llama), "LlamaForCausalLM", "float32")
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs) == (301, 64, 4)
    assert info.tokenizer.eos_token_ids == [2]
    # Room for four sequences of 64 tokens, which is less than 5 MiB hold.
    assert runner.capacity.num_blocks == 16


def test_the_models_own_length_is_the_default(tiny_llama: Path) -> None:
    assert Runner(_config(tiny_llama, max_model_len=None)).capacity.info.max_model_len == 512


def test_a_length_beyond_the_models_is_refused_with_the_numbers(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 513 is more than the 512 tokens"):
        Runner(_config(tiny_llama, max_model_len=513))


def test_too_little_memory_for_one_sequence_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"--max-model-len.*--kv-cache-memory"):
        Runner(_config(tiny_llama, kv_cache_memory=0.00001))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda: .* sees no GPU"):
        Runner(_config(tiny_llama, device="cuda"))


def test_the_cache_size_is_logged(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Runner(_config(tiny_llama))
    assert sum("KV cache:" in record.getMessage() for record in caplog.records) == 1


def test_bad_words_are_read_with_the_models_tokenizer(runner: Runner) -> None:
    from cacheflow.text.tokenizer import Tokenizer

    (letter,) = Tokenizer(runner.capacity.info.tokenizer).encode("a", add_bos=False)
    values: dict[str, Any] = {"temperature": 0.0, "seed": 0, "allowed_token_ids": [5, letter], "logit_bias": {letter: 100.0}}
    for bad_words, expected in (([], letter), (["a"], 5)):
        params = SamplingParams(**values, bad_words=bad_words)
        assert _generate(runner, [0], 64, params, num_tokens=1)[0][0].token_ids == [expected]
