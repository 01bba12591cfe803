from __future__ import annotations

import random
import time
from typing import Any

import pytest
from tiny_tokenizers import byte_level_bpe

from cacheflow.errors import InvalidRequestError
from cacheflow.text import Tokenizer
from cacheflow.text.requests import make_request
from cacheflow.types import EngineRequest, ModelInfo, SamplingParams

DATA = byte_level_bpe()
TOKENIZER = Tokenizer(DATA)
INFO = ModelInfo(
    model="tiny",
    architecture="Tiny",
    dtype="float32",
    vocab_size=200,
    max_model_len=32,
    max_num_seqs=8,
    tokenizer=DATA,
    engine_version="0",
)


def make(
    prompt: str | None = "hello",
    token_ids: Any = None,
    params: SamplingParams | None = None,
    request_id: Any = "r",
    **options: Any,
) -> EngineRequest:
    return make_request(INFO, TOKENIZER, prompt, token_ids, params, request_id, **options)


def test_a_text_becomes_its_tokens() -> None:
    request = make("hello")
    assert request.prompt_token_ids == TOKENIZER.encode("hello")
    assert abs(request.arrival_s - time.time()) < 60


def test_token_ids_and_everything_else_are_taken_as_they_are() -> None:
    params = SamplingParams(max_tokens=5, seed=1)
    request = make(None, [5, 4, 3], params, arrival_s=1.0, client_id="c", priority=-2, cache_salt="s")
    assert request == EngineRequest(
        request_id="r", prompt_token_ids=[5, 4, 3], params=params, arrival_s=1.0, client_id="c", priority=-2, cache_salt="s"
    )


def test_without_max_tokens_the_context_says_how_many() -> None:
    assert make(None, [1] * 12, SamplingParams(max_tokens=None)).params.max_tokens == 20


def test_max_tokens_never_goes_past_the_context() -> None:
    assert make(None, [1] * 31, SamplingParams(max_tokens=16)).params.max_tokens == 1


def test_a_given_seed_is_kept_and_a_missing_one_is_drawn() -> None:
    assert make(params=SamplingParams(seed=7)).params.seed == 7
    drawn = [make().params.seed for _ in range(2)]
    assert None not in drawn
    assert drawn[0] != drawn[1]


def test_seeds_come_from_the_given_generator() -> None:
    first, second = ([make(seeds=seeds).params.seed for _ in range(3)] for seeds in (random.Random(1), random.Random(1)))
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize(
    ("prompt", "token_ids", "message"),
    [
        ("", None, "The prompt is empty"),
        (None, [], "The prompt is empty"),
        (None, None, "text or a list of token ids, got NoneType"),
        (7, None, "text or a list of token ids, got int"),
        ("\ud800", None, "lone surrogate at character 0"),
        (None, [0, 200], r"prompt\[1\] is 200; the model's token ids go from 0 to 199"),
        (None, [-1], r"prompt\[0\] is -1"),
        (None, [True], r"prompt\[0\] must be a token id, got bool"),
        (None, [1.0], r"prompt\[0\] must be a token id, got float"),
        (None, [1] * 32, "The prompt has 32 tokens; tiny takes at most 31"),
        ("hello " * 40, None, r"The prompt has \d+ tokens; tiny takes at most 31"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_the_numbers(prompt: Any, token_ids: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as raised:
        make(prompt, token_ids)
    assert raised.value.param == "prompt"


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *arguments: pytest.fail("it was tokenised"))
    with pytest.raises(InvalidRequestError, match=r"has 7000 bytes, which are at least \d+ tokens; tiny takes at most 31"):
        make("a" * 7000)


def test_too_many_token_ids_are_refused_before_each_is_looked_at() -> None:
    with pytest.raises(InvalidRequestError, match="The prompt has 33 tokens"):
        make(None, [*[1] * 32, "x"])


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        (SamplingParams(n=9), "n", "n is 9, but the engine runs at most 8 sequences"),
        (SamplingParams(n=2, best_of=9), "best_of", "best_of is 9"),
        (SamplingParams(max_tokens=None, min_tokens=32), "min_tokens", "has room for 31 after a prompt of 1"),
        (SamplingParams(stop_token_ids=[200]), "stop_token_ids", r"stop_token_ids\[0\] is 200"),
        (SamplingParams(allowed_token_ids=[1, 200]), "allowed_token_ids", r"allowed_token_ids\[1\] is 200"),
        (SamplingParams(logit_bias={200: 1.0}), "logit_bias", r"logit_bias\[0\] is 200"),
    ],
)
def test_parameters_that_this_model_cannot_honour_are_refused(params: SamplingParams, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as raised:
        make(None, [1], params)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 257}, "request_id"),
        ({"request_id": 5}, "request_id"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"priority": 2**31}, "priority"),
        ({"priority": True}, "priority"),
    ],
)
def test_names_and_priorities_are_bounded(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError, match=param) as raised:
        make(**options)
    assert raised.value.param == param
