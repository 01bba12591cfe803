"""Structured output and embeddings on a real (tiny) model: in process, and through a child that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheflow import LLM, AsyncLLMServer, SamplingParams, StructuredOutput, async_server
from cacheflow.config import EngineConfig
from cacheflow.errors import InvalidRequestError

DIGITS = StructuredOutput(regex="[0-9]{30,60}")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
PROMPTS = ["The president of the United States is", "a", "Hello, my name is", "There are 12 months"]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(model=str(tiny_llama), dtype="float32", kv_cache_memory=0.05) as engine:
        yield engine


def texts(llm: LLM, structure: StructuredOutput, **params: Any) -> list[str]:
    params = {"max_tokens": 200, "temperature": 1.0, "seed": 3, **params}
    outputs = llm.generate(PROMPTS, SamplingParams(structured=structure, **params), use_tqdm=False)
    assert all(c.finish_reason == "stop" for o in outputs for c in o.outputs)
    return [c.text for o in outputs for c in o.outputs]


def test_json_follows_its_schema(llm: LLM) -> None:
    for text in texts(llm, StructuredOutput(json_schema=SCHEMA)):
        document = json.loads(text)
        assert list(document) == ["name", "tags"]
        assert len(document["name"]) <= 8
        assert set(document["tags"]) <= {"x", "y"}


@pytest.mark.parametrize(
    "params", [{"n": 3}, {"best_of": 3}, {"n": 2, "best_of": 3, "temperature": 0.0, "use_beam_search": True}]
)
def test_every_sequence_keeps_to_the_structure(llm: LLM, params: dict[str, Any]) -> None:
    found = texts(llm, StructuredOutput(choices=["red apple", "red pear", "blue"]), **params)
    assert len(found) == 4 * params.get("n", 1)
    assert set(found) <= {"red apple", "red pear", "blue"}


def test_a_grammar_and_greedy_choices(llm: LLM) -> None:
    found = texts(llm, StructuredOutput(grammar='start: item ("," item)~2\nitem: "a" | "(" item ")"'), temperature=0.8)
    assert all(re.fullmatch(r"\(*a\)*(,\(*a\)*){2}", text) and text.count("(") == text.count(")") for text in found)


def test_preempted_sequences_keep_to_the_structure_and_give_the_same_texts(llm: LLM, tiny_llama: Path) -> None:
    wanted = texts(llm, DIGITS, n=3)
    options: dict[str, Any] = {"kv_cache_memory": 0.0002, "max_model_len": 128, "block_size": 8}
    with LLM(model=str(tiny_llama), dtype="float32", **options) as small:
        assert texts(small, DIGITS, n=3) == wanted
        assert small.stats().num_preemptions > 0
    assert all(re.fullmatch("[0-9]{30,60}", text) for text in wanted)


def test_a_bad_structure_fails_alone(llm: LLM) -> None:
    params = [
        SamplingParams(structured=StructuredOutput(regex=regex), max_tokens=5) for regex in ("[ab]", "(", "[cd]", "(?=x)")
    ]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, False, True, False]


def test_a_structure_that_no_text_fits_is_refused_in_words(llm: LLM) -> None:
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    params = SamplingParams(structured=StructuredOutput(json_schema=loop))
    with pytest.raises(InvalidRequestError, match="json_schema can't be used: no text fits it") as caught:
        llm.generate(["Hello"], params, use_tqdm=False, raise_errors=True)
    assert caught.value.param == "json_schema"


def test_a_structure_that_other_parameters_leave_no_token_is_an_invalid_request(llm: LLM) -> None:
    params = SamplingParams(structured=StructuredOutput(regex="[ab]"), allowed_token_ids=[9])
    with pytest.raises(InvalidRequestError, match="allows no token"):
        llm.generate("a", params, use_tqdm=False, raise_errors=True)


def test_a_structure_whose_check_takes_too_long_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        config = EngineConfig(model=str(tiny_llama), dtype="float32", kv_cache_memory=0.05)
        async with await AsyncLLMServer.start(config) as server:
            monkeypatch.setattr(async_server, "CHECK_TIMEOUT_S", 0.0)
            with pytest.raises(InvalidRequestError, match="could not be checked within 0 s"):
                await anext(server.generate("a", SamplingParams(structured=DIGITS)))

    asyncio.run(main())


def test_a_served_request_goes_on_with_its_structure_behind_an_engine_that_died(tiny_llama: Path) -> None:
    async def main() -> None:
        config = EngineConfig(model=str(tiny_llama), dtype="float32", kv_cache_memory=0.05)
        params = SamplingParams(structured=DIGITS, max_tokens=100, n=2, seed=1)
        async with await AsyncLLMServer.start(config) as server:
            wanted = [output async for output in server.generate("a", params)][-1]
            is_killed = False
            async for output in server.generate("a", params):
                if not is_killed and len(output.outputs[0].token_ids) >= 5:
                    is_killed = True
                    os.kill(server._process._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            assert is_killed
            assert [c.text for c in output.outputs] == [c.text for c in wanted.outputs]
            assert all(re.fullmatch("[0-9]{30,60}", c.text) for c in output.outputs)
            with pytest.raises(InvalidRequestError, match="regex can't be used"):
                await anext(server.generate("a", SamplingParams(structured=StructuredOutput(regex="("))))

    asyncio.run(main())


def test_an_embedding_survives_the_engine(tiny_llama: Path) -> None:
    async def main() -> None:
        config = EngineConfig(model=str(tiny_llama), dtype="float32", kv_cache_memory=0.05, max_num_batched_tokens=256)
        async with await AsyncLLMServer.start(config) as server:
            prompts = [[5 + i] * 400 for i in range(3)]
            wanted = [await server.embed(prompt) for prompt in prompts]
            pid = server._process._process.pid  # type: ignore[union-attr]
            os.kill(pid, signal.SIGSTOP)
            pending = [asyncio.ensure_future(server.embed(prompt)) for prompt in prompts]
            for _ in range(10):
                await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            found = await asyncio.wait_for(asyncio.gather(*pending), 240)
            assert [output.embedding for output in found] == [output.embedding for output in wanted]
            stats = await server.stats()
            assert stats.num_running == stats.num_waiting == 0

    asyncio.run(main())
