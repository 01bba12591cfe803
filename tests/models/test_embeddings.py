"""Embeddings against the hidden states of the same weights in transformers, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheflow import LLM, SamplingParams
from cacheflow.errors import InvalidRequestError

PROMPTS = [[5, 9, 40, 77, 300, 12, 8], [17], list(range(4, 104)), [100, 3, 250]]
MAX_DIFFERENCE = 1e-5


@pytest.fixture(scope="module")
def make_llm(tiny_llama: Path) -> Callable[..., LLM]:
    return lambda **options: LLM(str(tiny_llama), **{"dtype": "float32", "kv_cache_memory": 0.05, **options})


@pytest.fixture(scope="module")
def llm(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    with make_llm() as engine:
        yield engine


def hidden_states(folder: Path, token_ids: list[int]) -> torch.Tensor:
    from transformers import AutoModel

    twin: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states: torch.Tensor = twin(torch.tensor([token_ids])).last_hidden_state[0]
    return states


def vectors(llm: LLM, **options: Any) -> torch.Tensor:
    return torch.tensor([output.embedding for output in llm.embed(PROMPTS, **options)])


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_opt"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_pooled_last_hidden_states_of_transformers(
    fixture: str, pooling: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    with LLM(model=str(folder), dtype="float32", kv_cache_memory=0.05) as engine:
        outputs = engine.embed(PROMPTS, pooling=pooling, normalize=False)  # type: ignore[arg-type]
    for token_ids, output in zip(PROMPTS, outputs, strict=True):
        states = hidden_states(folder, token_ids)
        expected = states.mean(dim=0) if pooling == "mean" else states[-1]
        assert output.prompt_token_ids == token_ids
        assert (torch.tensor(output.embedding) - expected).abs().max() <= MAX_DIFFERENCE


def test_embeddings_have_length_one_unless_asked_otherwise(llm: LLM) -> None:
    plain = vectors(llm, normalize=False)
    assert torch.allclose(vectors(llm), plain / plain.norm(dim=-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_in_chunks_equal_those_of_whole_prompts(llm: LLM, make_llm: Callable[..., LLM], pooling: str) -> None:
    with make_llm(max_num_batched_tokens=7, max_num_seqs=4) as chunked:
        assert torch.allclose(vectors(chunked, pooling=pooling), vectors(llm, pooling=pooling), atol=MAX_DIFFERENCE)


def test_embeddings_beside_preemptions_equal_those_alone(llm: LLM, make_llm: Callable[..., LLM]) -> None:
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    prompt, wanted = list(range(4, 24)), llm.embed([list(range(4, 204))])[0].embedding
    with make_llm(kv_cache_memory=0.00017, max_model_len=256, max_num_batched_tokens=8, max_num_seqs=4) as small:
        streams = [small.stream(prompt[i:], params) for i in range(3)]
        for stream in streams:
            next(stream)
        output = small.embed([list(range(4, 204))])[0].embedding
        for stream in streams:
            list(stream)
        assert small.stats().num_preemptions > 0
    assert torch.allclose(torch.tensor(output), torch.tensor(wanted), atol=MAX_DIFFERENCE)


def test_an_embedding_reads_no_cached_block_and_leaves_its_own(make_llm: Callable[..., LLM]) -> None:
    prompt = list(range(4, 104))
    with make_llm() as engine:
        first, second = engine.embed([prompt])[0], engine.embed([prompt])[0]
        assert engine.stats().num_cached_tokens == 0
        assert first.embedding == second.embedding
        output = engine.generate(prompt_token_ids=[prompt], sampling_params=SamplingParams(max_tokens=1), use_tqdm=False)[0]
        assert output.num_cached_tokens == 96


def test_blocks_are_free_once_an_embedding_is_there(llm: LLM) -> None:
    llm.embed(PROMPTS)
    stats = llm.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_a_prompt_may_fill_the_whole_context(llm: LLM) -> None:
    length = llm.model_info.max_model_len
    assert len(llm.embed([[7] * length])[0].embedding) == 64
    with pytest.raises(InvalidRequestError, match=f"{length + 1} tokens.*at most {length} "):
        llm.embed([[7] * (length + 1)])


def test_an_unknown_pooling_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match='"mean" or "last"'):
        llm.embed("a", pooling="max")  # type: ignore[arg-type]
