"""The real demo model, SmolLM2-135M-Instruct, beside transformers on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheflow import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "The quick brown fox",
    "The president of the United States is",
    "The future of AI is",
    "San Francisco is a",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village,",
    "A list of fruits:",
    "To make a good cup of tea, first",
]


def twin_of(demo_model: Path, dtype: torch.dtype) -> Any:
    """transformers' own Llama with the demo file's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cacheflow.loading.gguf_file import GGUFLoader

    twin = LlamaForCausalLM(LlamaConfig(**GGUFLoader.config(demo_model))).eval()
    weights = dict(GGUFLoader.tensors(demo_model))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    twin.load_state_dict(weights)
    for parameter in twin.parameters():  # and not the rotary frequencies, which `from_pretrained` keeps in float32 too
        parameter.data = parameter.data.to(dtype)
    return twin


def continue_with(twin: Any, prompt_ids: list[int], **options: Any) -> list[list[int]]:
    with torch.inference_mode():
        sequences = twin.generate(torch.tensor([prompt_ids]), do_sample=False, pad_token_id=0, **options)
    return [row[len(prompt_ids) :].tolist() for row in sequences]


@pytest.fixture(scope="module")
def exact(demo_model: Path) -> Iterator[LLM]:
    with LLM(model=str(demo_model), dtype="float32", kv_cache_memory=0.2, max_model_len=256) as engine:
        yield engine


def regret(exact_twin: Any, prompt_ids: list[int], token_ids: list[int]) -> float:
    """By how much a token's logit is below the best one's, in float32, where it is most."""
    with torch.inference_mode():
        logits = exact_twin(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return float((logits.amax(dim=1) - chosen).max())


def test_the_first_greedy_tokens_in_bfloat16_are_those_of_transformers_or_as_good(demo_model: Path) -> None:
    """Where two tokens are about as likely, each processor's bfloat16 has its own favourite, in torch too: 0.13 were seen."""
    twin, exact_twin = twin_of(demo_model, torch.bfloat16), twin_of(demo_model, torch.float32)
    with LLM(model=str(demo_model), dtype="bfloat16", kv_cache_memory=0.2, max_model_len=256) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    num_equal = 0
    for output in outputs:
        expected = continue_with(twin, output.prompt_token_ids, max_new_tokens=8, eos_token_id=None)
        num_equal += output.outputs[0].token_ids == expected[0]
        assert regret(exact_twin, output.prompt_token_ids, output.outputs[0].token_ids) < 0.5
    assert num_equal >= 6


def test_beams_are_those_of_transformers(demo_model: Path, exact: LLM) -> None:
    twin = twin_of(demo_model, torch.float32)
    params = SamplingParams(n=4, use_beam_search=True, temperature=0.0, max_tokens=10)
    for output in exact.generate(PROMPTS[:4], params, use_tqdm=False):
        expected = continue_with(
            twin, output.prompt_token_ids, num_beams=4, num_return_sequences=4, max_new_tokens=10, eos_token_id=2
        )
        assert [c.text for c in output.outputs] == [exact.tokenizer.decode(tokens) for tokens in expected]


def test_the_model_knows_the_capital_of_france(exact: LLM) -> None:
    output = exact.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)[0]
    assert "Paris" in output.outputs[0].text


@pytest.mark.parametrize("quantization", ["int8", "int4", "int8-dynamic"])
def test_quantised_weights_give_sane_text(demo_model: Path, quantization: str) -> None:
    with LLM(model=str(demo_model), quantization=quantization, kv_cache_memory=0.2, max_model_len=256) as engine:
        outputs = engine.generate(PROMPTS[:2], SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
    assert outputs[0].outputs[0].text.startswith(" Paris")
    assert outputs[1].outputs[0].text.strip()
