"""`/tokenize`, `/detokenize` and `/version` on a real engine."""

from __future__ import annotations

from typing import Any

import pytest


def test_a_text_goes_to_token_ids_and_back(chat_client: Any, chat_engine: Any) -> None:
    text = "Hello there 😀"
    answer = chat_client.post("/tokenize", json={"model": "scripted", "prompt": text}).json()
    assert answer["tokens"] == chat_engine.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert chat_client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_special_tokens_can_be_left_out_of_a_text(chat_client: Any) -> None:
    body = {"tokens": [1, 0], "skip_special_tokens": True}
    assert chat_client.post("/detokenize", json=body).json() == {"prompt": ""}


def test_a_token_before_the_text_is_added_as_the_model_wants_it_or_as_asked(app_client: Any, engine: Any) -> None:
    from cacheflow_openai.app import OpenAIFrontend, OpenAIOptions

    client = app_client(OpenAIFrontend.create_app(engine, OpenAIOptions()))

    def ids(**fields: Any) -> list[int]:
        found: list[int] = client.post("/tokenize", json={"prompt": "Hello", **fields}).json()["tokens"]
        return found

    assert ids() == ids(add_special_tokens=True) == [2, *ids(add_special_tokens=False)]


def test_the_texts_of_tokens_can_be_had_too(chat_client: Any) -> None:
    answer = chat_client.post("/tokenize", json={"prompt": "Hello!", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["Hello", "!"]


def test_the_versions_are_told(chat_client: Any) -> None:
    assert set(chat_client.get("/version").json()) == {"version", "engine_version"}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ],
)
def test_a_bad_field_is_named(chat_client: Any, path: str, fields: dict[str, Any], param: str) -> None:
    answer = chat_client.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
