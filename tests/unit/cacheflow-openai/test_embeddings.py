"""`/v1/embeddings` on a real engine."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest

TEXTS = ["Hello", "Hello there", "San Francisco"]


def embed(client: Any, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/embeddings", json={"model": "scripted", **fields})
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def vectors(client: Any, **fields: Any) -> list[list[float]]:
    return [item["embedding"] for item in embed(client, **fields)["data"]]


def test_the_answer_has_a_vector_for_each_text_in_order(chat_client: Any, chat_engine: Any) -> None:
    answer = embed(chat_client, input=TEXTS)
    assert (answer["object"], answer["model"]) == ("list", "scripted")
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", i) for i in range(3)]
    assert [vectors(chat_client, input=text)[0] for text in TEXTS] == [
        pytest.approx(item["embedding"], abs=1e-5) for item in answer["data"]
    ]
    num_tokens = sum(len(chat_engine.tokenizer.encode(text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_vectors_have_length_one(chat_client: Any) -> None:
    for pooling in ("mean", "last"):
        for vector in vectors(chat_client, input=TEXTS, pooling=pooling):
            assert math.hypot(*vector) == pytest.approx(1)


def test_the_mean_is_of_all_tokens_and_last_of_the_last(chat_client: Any) -> None:
    # The scripted model's hidden states are one-hot, so a vector shows which tokens it is of.
    ids = [10, 11, 11, 12]
    [mean] = vectors(chat_client, input=ids)
    [last] = vectors(chat_client, input=ids, pooling="last")
    assert [index for index, value in enumerate(mean) if value > 1e-3] == [10, 11, 12]
    assert mean[11] == pytest.approx(2 * mean[10])
    assert [index for index, value in enumerate(last) if value > 1e-3] == [12]


def test_base64_holds_the_same_numbers(chat_client: Any) -> None:
    [vector] = vectors(chat_client, input="Hello")
    [encoded] = vectors(chat_client, input="Hello", encoding_format="base64")
    assert isinstance(encoded, str)
    assert struct.unpack(f"<{len(vector)}f", base64.b64decode(encoded)) == pytest.approx(vector)


def test_token_ids_are_taken_as_they_are(chat_client: Any, chat_engine: Any) -> None:
    ids = [chat_engine.tokenizer.encode(text) for text in TEXTS]
    assert vectors(chat_client, input=ids) == [pytest.approx(v, abs=1e-5) for v in vectors(chat_client, input=TEXTS)]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "input", None),
        ({"input": []}, "input", None),
        ({"input": ""}, "input", None),
        ({"input": ["a", 1]}, "input", None),
        ({"input": ["a"] * 2049}, "input", None),
        ({"input": "x" * 3000}, "input", "context_length_exceeded"),
        ({"input": "a", "dimensions": 3}, "dimensions", None),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", None),
        ({"input": "a", "pooling": "max"}, "pooling", None),
    ],
)
def test_a_bad_field_is_named(chat_client: Any, fields: dict[str, Any], param: str, code: str | None) -> None:
    answer = chat_client.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
