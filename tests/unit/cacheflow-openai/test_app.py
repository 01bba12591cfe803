"""The OpenAI-compatible frontend on a real engine, driven in process."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from cacheflow_openai.app import OpenAIFrontend, OpenAIOptions
from cacheflow_openai.models import fingerprint

ORIGIN = {"origin": "https://a.example"}
MODEL = "facebook/opt-125m"


@pytest.fixture(scope="session")
def client(loop: Any, engine: Any, app_client: Any) -> Any:
    return app_client(OpenAIFrontend.create_app(engine, OpenAIOptions()))


def complete(client: Any, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"model": MODEL, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: Any, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends with exactly one [DONE]."""
    answer = client.post("/v1/completions", json={"model": MODEL, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: {") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the chunks of each choice make together."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(
            choice["index"], {"index": choice["index"], "text": "", "logprobs": None, "finish_reason": None}
        )
        assert whole["finish_reason"] is None, "a chunk after the last one"
        whole["text"] += choice["text"]
        whole["finish_reason"] = choice["finish_reason"]
        if choice["logprobs"] is not None:
            before = whole["logprobs"] or {name: [] for name in choice["logprobs"]}
            whole["logprobs"] = {name: before[name] + choice["logprobs"][name] for name in before}
    return choices


def assert_same(choice: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal, but for the rounding of log probabilities that were computed in batches of another shape."""
    mine, others = choice["logprobs"], other["logprobs"]
    assert {**choice, "logprobs": None} == {**other, "logprobs": None}
    if mine is None or others is None:
        assert mine is others
        return
    assert (mine["tokens"], mine["text_offset"]) == (others["tokens"], others["text_offset"])
    assert mine["token_logprobs"] == pytest.approx(others["token_logprobs"], abs=1e-4)
    for top, others_top in zip(mine["top_logprobs"], others["top_logprobs"], strict=True):
        assert top == (None if others_top is None else pytest.approx(others_top, abs=1e-4))


def refusal(client: Any, status: int = 400, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"model": MODEL, **fields})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_completion_is_an_openai_object(client: Any) -> None:
    answer = complete(client, prompt="San Francisco is a", max_tokens=7, temperature=0)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert isinstance(answer["created"], int)
    assert answer["model"] == MODEL
    [choice] = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    usage = answer["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7


def test_a_fingerprint_tells_the_model_and_stays_the_same(client: Any, engine: Any) -> None:
    first, second = (complete(client, prompt="Hello", max_tokens=1)["system_fingerprint"] for _ in range(2))
    assert first == second
    assert re.fullmatch("fp_[0-9a-f]{10}", first)
    assert first != fingerprint(replace(engine.model_info, dtype="int8"))


def test_negative_seeds_are_taken_and_differ_from_one_another(client: Any) -> None:
    texts = [complete(client, prompt="Hello", seed=seed)["choices"][0]["text"] for seed in (-1, -1, -2, -(2**63))]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    for seed in (-(2**63) - 1, 2**63):
        error = refusal(client, prompt="Hello", seed=seed)
        assert error["param"] == "seed"
        assert f"from {-(2**63)} to {2**63 - 1}" in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream": "yes"}, "stream must be true or false, got 'yes'."),
        ({"cache_salt": 5}, "cache_salt must be a string, got 5."),
        ({"prompt": [["a"]]}, "prompt must be a string, a list of token ids, or a list of either, got [['a']]."),
        ({"stream_options": "x" * 200}, f"stream_options must be an object, got '{'x' * 76}...."),
    ],
)
def test_a_refusal_names_the_field_what_it_may_be_and_what_it_is(client: Any, fields: Any, message: str) -> None:
    assert refusal(client, **{"prompt": "Hello", **fields})["message"] == message


def test_a_null_means_the_default(client: Any, engine: Any) -> None:
    nulls = dict.fromkeys(
        ("max_tokens", "stop", "n", "logprobs", "seed", "suffix", "echo", "stream", "stream_options", "best_of")
    )
    assert complete(client, prompt="Hello", temperature=0, **nulls)["usage"]["completion_tokens"] == 16


def test_cached_prompt_tokens_are_counted(client: Any) -> None:
    prompt = "The capital of France is Paris, and the future of AI is here to stay."
    complete(client, prompt=prompt, max_tokens=1)
    usage = complete(client, prompt=prompt, max_tokens=1)["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_the_choices_of_several_prompts_are_in_the_order_of_the_prompts(client: Any, engine: Any) -> None:
    prompts = ["Hello, my name is", "The capital of France is", "San"]
    answer = complete(client, prompt=prompts, n=2, temperature=0, max_tokens=5, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        assert choice["text"].startswith(prompts[choice["index"] // 2])
    assert answer["usage"]["completion_tokens"] == 30
    by_ids = complete(client, prompt=[engine.tokenizer.encode(p) for p in prompts], n=2, temperature=0, max_tokens=5, echo=True)
    assert by_ids["choices"] == answer["choices"]


def test_one_list_of_token_ids_is_one_prompt(client: Any, engine: Any) -> None:
    ids = engine.tokenizer.encode("Hello, my name is")
    assert (
        complete(client, prompt=ids, temperature=0)["choices"]
        == complete(client, prompt="Hello, my name is", temperature=0)["choices"]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Hello", "seed": 3, "max_tokens": 30},
        {"prompt": ["Hello", "San Francisco is a"], "n": 3, "seed": 3, "max_tokens": 20, "logprobs": 3},
        {"prompt": "Hello", "seed": 3, "echo": True, "logprobs": 2, "max_tokens": 20},
        {"prompt": "Hello", "seed": 3, "echo": True, "logprobs": 2, "max_tokens": 0},
        {"prompt": "Hello", "seed": 4, "n": 2, "best_of": 5},
        {"prompt": "Hello", "temperature": 0, "n": 2, "best_of": 3, "use_beam_search": True, "logprobs": 0},
        {"prompt": "Hello", "seed": 3, "stop": ["a", "e"], "max_tokens": 60, "n": 4, "logprobs": 1},
    ],
)
def test_the_chunks_of_a_stream_make_the_whole_answer(client: Any, fields: dict[str, Any]) -> None:
    whole = complete(client, **fields)
    chunks = events(client, **fields, stream_options={"include_usage": True})
    streamed = joined(chunks)
    assert len(streamed) == len(whole["choices"])
    for choice in whole["choices"]:
        assert_same(streamed[choice["index"]], choice)
    assert chunks[-1]["choices"] == []
    # The prompt is cached the second time; all else is the same.
    assert chunks[-1]["usage"].items() >= {k: v for k, v in whole["usage"].items() if k != "prompt_tokens_details"}.items()
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_it(client: Any) -> None:
    assert all("usage" not in chunk for chunk in events(client, prompt="Hello", temperature=0))


@pytest.mark.parametrize("fields", [{"best_of": 4}, {"best_of": 4, "use_beam_search": True, "temperature": 0}])
def test_sequences_that_are_chosen_at_the_end_come_in_one_chunk_each(client: Any, fields: dict[str, Any]) -> None:
    chunks = events(client, prompt="Hello", n=2, seed=1, **fields)
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1]


def test_logprobs_count_characters_from_the_start_of_the_prompt(client: Any) -> None:
    prompt = "San Francisco is a"
    [choice] = complete(client, prompt=prompt, max_tokens=12, seed=5, logprobs=2)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"][0] == len(prompt)
    whole = prompt + choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or whole[offset:].startswith(token)


def test_the_chosen_token_is_among_the_top_logprobs_with_the_same_value(client: Any) -> None:
    [choice] = complete(client, prompt="Hello", max_tokens=40, seed=5, logprobs=1)["choices"]
    logprobs = choice["logprobs"]
    for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert len(top) <= 2


def test_echo_scores_the_prompt_without_generating(client: Any, engine: Any) -> None:
    prompt = "San Francisco is a"
    answer = complete(client, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    [choice] = answer["choices"]
    assert choice["text"] == prompt
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(logprob < 0 for logprob in choice["logprobs"]["token_logprobs"][1:])
    assert len(choice["logprobs"]["tokens"]) == len(engine.tokenizer.encode(prompt)) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


def test_the_prompts_logprobs_can_be_had_by_token_id(client: Any, engine: Any) -> None:
    ids = engine.tokenizer.encode("Hello, my name")
    [choice] = complete(client, prompt=ids, max_tokens=1, prompt_logprobs=2)["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert all(str(i) in entry for i, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True))


def test_a_stop_string_is_not_part_of_the_text(client: Any) -> None:
    text = complete(client, prompt="Hello", temperature=0, max_tokens=30)["choices"][0]["text"]
    stop = text[6:8]
    [choice] = complete(client, prompt="Hello", temperature=0, max_tokens=30, stop=stop)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_logit_bias_takes_token_ids_as_json_must_write_them(client: Any, engine: Any) -> None:
    token_id = engine.tokenizer.encode("z", add_bos=False)[0]
    assert (
        complete(client, prompt="a", temperature=0, max_tokens=3, logit_bias={str(token_id): 100})["choices"][0]["text"]
        == "zzz"
    )


def test_unknown_fields_are_ignored_and_named_in_a_header(client: Any) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "user": "me", "guided_json": {}, "bad\r\nname: x": 1, "": 1})
    assert answer.status_code == 200
    assert answer.headers["x-cacheflow-ignored-fields"] == 'guided_json, bad%0D%0Aname%3A%20x, ""'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[True]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "a b " * 400}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "7"}, "max_tokens"),
        ({"prompt": "a", "stop": list("abcde")}, "stop"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "n": 200}, "n"),
        ({"prompt": "a", "echo": "yes"}, "echo"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "cache_salt": 1}, "cache_salt"),
        ({"prompt": "a", "model": 1}, "model"),
    ],
)
def test_a_bad_field_is_named(client: Any, fields: dict[str, Any], param: str) -> None:
    error = refusal(client, **fields)
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("fields", [{"prompt": "a b " * 400}, {"prompt": "a", "max_tokens": 512}, {"prompt": [5] * 512}])
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_into_the_context_is_refused_as_openai_does(
    client: Any, fields: dict[str, Any], stream: bool
) -> None:
    error = refusal(client, stream=stream, **fields)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("max_tokens" if "max_tokens" in fields else "prompt")
    assert "512" in error["message"]


def test_best_of_counts_all_that_was_generated(client: Any) -> None:
    usage = complete(client, prompt="Hello", best_of=4, n=2, max_tokens=5, ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 20


def test_32_greedy_streams_at_a_time_have_the_texts_that_they_have_alone(client: Any) -> None:
    def text(number: int) -> str:
        chunks = events(client, prompt=f"{number} Hello, my name", temperature=0, max_tokens=24, ignore_eos=True)
        return joined(chunks)[0]["text"]

    alone = [text(number) for number in range(32)]
    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(text, range(32))) == alone
    assert len(set(alone)) > 1


def test_a_stream_that_is_refused_has_the_status_of_the_refusal(client: Any) -> None:
    assert refusal(client, prompt=[100_000], stream=True)["param"] == "prompt"


def test_another_model_is_not_found(client: Any) -> None:
    error = refusal(client, status=404, model="gpt-4", prompt="a")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_the_served_model_is_listed_and_shown(client: Any) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert (card["id"], card["object"]) == (MODEL, "model")
    assert client.get(f"/v1/models/{MODEL}").json() == card
    missing = client.get("/v1/models/gpt-4")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_the_model_can_be_given_another_name(engine: Any, app_client: Any) -> None:
    client = app_client(OpenAIFrontend.create_app(engine, OpenAIOptions(served_model_name=("tiny",))))
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert complete(client, model="tiny", prompt="a")["model"] == "tiny"
    assert refusal(client, status=404, prompt="a")["param"] == "model"


def test_of_several_names_all_are_served_and_the_first_is_answered(engine: Any, app_client: Any) -> None:
    client = app_client(OpenAIFrontend.create_app(engine, OpenAIOptions(served_model_name=("tiny", "org/small"))))
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "org/small"]
    assert client.get("/v1/models/org/small").json()["id"] == "org/small"
    assert {complete(client, model=name, prompt="a")["model"] for name in ("tiny", "org/small", None)} == {"tiny"}
    assert "'tiny', 'org/small'" in refusal(client, status=404, prompt="a")["message"]


def test_an_answer_is_named_as_the_request_is_in_headers_and_log(client: Any) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["id"].startswith("cmpl-mine-")
    assert complete(client, prompt=["a", "b"], max_tokens=1)["id"] != complete(client, prompt="a", max_tokens=1)["id"]


def test_a_body_that_is_not_called_json_is_refused(client: Any) -> None:
    answer = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("POST", "/v1/completions/", 404), ("GET", "/v1/completions", 405)],
)
def test_unknown_routes_and_methods_get_the_same_shape_of_error(client: Any, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/version", "/health"])
def test_what_can_be_read_can_be_asked_for_by_head(client: Any, path: str) -> None:
    assert client.request("HEAD", path).status_code == 200


def test_a_running_engine_is_alive_and_ready(client: Any) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_blocks(client: Any, engine: Any, loop: Any, stream: bool) -> None:
    fields = {"prompt": ["Hello", "San"], "stream": stream, "max_tokens": 500, "ignore_eos": True, "n": 4}
    parts = client.post_and_hang_up("/v1/completions", json.dumps(fields).encode(), after_parts=2 if stream else 0)
    assert b"[DONE]" not in b"".join(parts)
    stats = loop.run(engine.stats())
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_without_allowed_origins_there_are_no_cors_headers(client: Any) -> None:
    assert not [name for name in client.get("/health", headers=ORIGIN).headers if name.startswith("access-control")]


def test_a_page_of_an_allowed_origin_may_call(engine: Any, app_client: Any) -> None:
    options = OpenAIOptions(
        allowed_origins=("https://a.example",), allow_credentials=True, allowed_methods=("POST",), allowed_headers=("x-a",)
    )
    client = app_client(OpenAIFrontend.create_app(engine, options))
    headers = client.get("/health", headers=ORIGIN).headers
    assert headers["access-control-allow-origin"] == "https://a.example"
    assert headers["access-control-allow-credentials"] == "true"
    asked = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    assert client.request("OPTIONS", "/v1/completions", headers=asked).status_code == 200
    refused = {**ORIGIN, "access-control-request-method": "PUT"}
    assert client.request("OPTIONS", "/v1/completions", headers=refused).status_code == 400
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": "https://b.example"}).headers
