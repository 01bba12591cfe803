from __future__ import annotations

import math

import pytest

from cacheflow.errors import InvalidRequestError, RequestFailedError
from cacheflow.text.embedding import embedding_output
from cacheflow.types import EngineRequest, RequestUpdate, SamplingParams

REQUEST = EngineRequest(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(), arrival_s=0.0, task="embed")


def embedding(update: RequestUpdate, normalize: bool = True) -> list[float]:
    return embedding_output(REQUEST, update, "text", normalize=normalize).embedding


def update_with(embedding: list[float]) -> RequestUpdate:
    return RequestUpdate(request_id="r", sequences=[], finished=True, embedding=embedding)


def test_a_vector_has_length_1_unless_it_is_wanted_as_it_is_or_is_zero() -> None:
    assert embedding(update_with([3.0, 4.0])) == [0.6, 0.8]
    assert embedding(update_with([3.0, 4.0]), normalize=False) == [3.0, 4.0]
    assert embedding(update_with([0.0, 0.0])) == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_made_of_numbers_is_an_error_and_no_vector(value: float) -> None:
    with pytest.raises(RequestFailedError, match="not numbers"):
        embedding(update_with([1.0, value]))


def test_a_request_without_a_vector_says_why() -> None:
    refused = RequestUpdate(request_id="r", sequences=[], finished=True, error="Too long.", is_invalid=True, param="prompt")
    with pytest.raises(InvalidRequestError, match="Too long") as caught:
        embedding(refused)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestFailedError, match="aborted"):
        embedding(RequestUpdate(request_id="r", sequences=[], finished=True))
