"""Sampling parameters: every bound names its field, value and range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cacheflow import SamplingParams
from cacheflow.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 129), ("n", True), ("n", 1.0), ("best_of", 0), ("best_of", 129),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", 11),
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 10**400),
        ("temperature", "1"), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1),
        ("seed", -1), ("seed", 2**63), ("length_penalty", 11), ("early_stopping", "sometimes"), ("stop", ["a"] * 17),
        ("stop", [""]), ("stop", ["a" * 257]), ("stop", [1]), ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 129),
        ("max_tokens", 0), ("min_tokens", -1), ("min_tokens", 17), ("logprobs", 21), ("logprobs", -1), ("prompt_logprobs", 21),
        ("logit_bias", {1: 101}), ("logit_bias", {1: 10**400}), ("logit_bias", {"1": 1.0}), ("logit_bias", [1]),
        ("allowed_token_ids", []), ("bad_words", [""]), ("bad_words", ["a"] * 129), ("skip_special_tokens", 1),
        ("use_beam_search", "yes"), ("ignore_eos", None), ("extra", {1: 2}), ("extra", {str(i): i for i in range(33)}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field} must be .*, got ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("others", [{"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"n": 1}])
def test_beam_search_refuses_what_it_has_no_use_for(others: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="use_beam_search"):
        SamplingParams(**{"n": 2, "use_beam_search": True, "temperature": 0.0, **others})


def test_parameters_can_be_replaced_one_by_one() -> None:
    params = replace(SamplingParams(temperature=0.0), n=3)
    assert params.num_sequences == 3
    assert replace(params, best_of=5).num_sequences == 5


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
