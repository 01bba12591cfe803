"""The simple frontend on a real engine, driven in process."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from cacheflow.types import SAMPLING_FIELDS, CompletionOutput, SamplingParams
from cacheflow_server.app import SimpleFrontend, SimpleOptions
from cacheflow_server.schema import FIELDS

ORIGIN = {"origin": "https://a.example"}
QUICKSTART_BODY = b"""{
            "prompt": "San Francisco is a",
            "use_beam_search": true,
            "n": 4,
            "temperature": 0
        }"""


@pytest.fixture(scope="session")
def client(loop: Any, engine: Any, app_client: Any) -> Any:
    return app_client(SimpleFrontend.create_app(engine, SimpleOptions(max_body_bytes=20_000)))


def refusal(client: Any, body: bytes | dict[str, Any], status: int = 400) -> dict[str, Any]:
    answer = client.post("/generate", content=body if isinstance(body, bytes) else json.dumps(body))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def documents(body: bytes) -> list[dict[str, Any]]:
    *parts, rest = body.split(b"\0")
    assert rest == b""
    return [json.loads(part) for part in parts]


def test_the_quickstarts_body_gives_four_different_beams_behind_the_prompt(client: Any, engine: Any, loop: Any) -> None:
    async def beams() -> list[CompletionOutput]:
        outputs = engine.generate("San Francisco is a", SamplingParams(use_beam_search=True, n=4, temperature=0))
        return [output async for output in outputs][-1].outputs

    answer = client.post("/generate", content=QUICKSTART_BODY, headers={"content-type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 200
    expected = loop.run(beams())
    # By their tokens: a model that knows no language makes bytes that are no characters, and those all look the same.
    assert len({tuple(beam.token_ids) for beam in expected}) == 4
    assert answer.json() == {"text": [f"San Francisco is a{beam.text}" for beam in expected]}


def test_token_ids_give_the_same_text_as_the_text_they_spell(client: Any, engine: Any) -> None:
    ids = engine.tokenizer.encode("Hello, my name is")
    by_ids = client.post("/generate", json={"prompt": ids, "temperature": 0})
    by_text = client.post("/generate", json={"prompt": "Hello, my name is", "temperature": 0})
    assert by_ids.json() == by_text.json()


def test_a_stream_grows_to_the_text_of_the_whole_answer(client: Any) -> None:
    asked = {"prompt": "Hello, my name is", "n": 2, "seed": 7, "max_tokens": 24}
    whole = client.post("/generate", json=asked).json()
    streamed = documents(client.post("/generate", json={**asked, "stream": True}).content)
    assert streamed[-1] == whole
    assert len(streamed) > 2
    for before, after in pairwise(streamed):
        assert all(new.startswith(old) for old, new in zip(before["text"], after["text"], strict=True))


def test_a_stream_of_beams_is_its_final_texts(client: Any) -> None:
    streamed = documents(client.post("/generate", json={**json.loads(QUICKSTART_BODY), "stream": True}).content)
    assert streamed == [client.post("/generate", content=QUICKSTART_BODY).json()]


def test_every_sampling_parameter_is_accepted(client: Any) -> None:
    values = {
        "n": 1, "best_of": 2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "temperature": 0.7,
        "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 1, "use_beam_search": False, "length_penalty": 1.0,
        "early_stopping": False, "stop": ["zzz"], "stop_token_ids": [5], "include_stop_str_in_output": True, "ignore_eos": True,
        "max_tokens": 4, "min_tokens": 2, "logit_bias": {"7": 1.5},
        "allowed_token_ids": list(range(4, 300)), "bad_words": ["bad"], "skip_special_tokens": False, "extra": {},
    }  # fmt: skip
    assert set(values) == set(SAMPLING_FIELDS) - {"logprobs", "prompt_logprobs", "structured"}
    answer = client.post("/generate", json={"prompt": "Hello", **values})
    assert answer.status_code == 200, answer.text


def test_a_null_means_the_default(client: Any) -> None:
    nulls = dict.fromkeys(("stream", *SAMPLING_FIELDS))
    nulls.pop("temperature")
    plain = {"prompt": "Hello", "temperature": 0}
    assert client.post("/generate", json={**plain, **nulls}).json() == client.post("/generate", json=plain).json()


def test_log_probabilities_of_the_prompt_are_left_to_the_openai_frontend(client: Any) -> None:
    error = refusal(client, {"prompt": "a", "prompt_logprobs": 1})
    assert error["param"] == "prompt_logprobs"
    assert "cacheflow serve openai" in error["message"]


def test_log_probabilities_stand_beside_the_texts_they_spell(client: Any) -> None:
    asked = {"prompt": "Hello", "n": 2, "seed": 3, "logprobs": 2, "max_tokens": 5}
    answer = client.post("/generate", json=asked).json()
    assert set(answer) == {"text", "logprobs"}
    for entries in answer["logprobs"]:
        assert len(entries) == 5
        for entry in entries:
            assert entry["top"][entry["token"]] == entry["logprob"] <= 0
            assert 1 <= len(entry["top"]) <= 3
    plain = {name: value for name, value in asked.items() if name != "logprobs"}
    assert client.post("/generate", json=plain).json() == {"text": answer["text"]}


def test_a_stream_with_log_probabilities_grows_to_the_whole_answer(client: Any) -> None:
    asked = {"prompt": "Hello", "temperature": 0, "logprobs": 1, "max_tokens": 8}
    streamed = documents(client.post("/generate", json={**asked, "stream": True}).content)
    assert streamed[-1] == client.post("/generate", json=asked).json()
    lengths = [len(document["logprobs"][0]) for document in streamed]
    assert lengths == sorted(lengths)
    assert len(streamed) > 2


def events(body: bytes) -> list[dict[str, Any]]:
    *parts, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"logprobs": 1}])
def test_a_client_that_accepts_events_gets_events_up_to_done(client: Any, fields: dict[str, Any]) -> None:
    asked = {"prompt": "Hello", "temperature": 0, "max_tokens": 8, **fields}
    answer = client.post("/generate", json=asked, headers={"accept": "text/event-stream"})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    streamed = events(answer.content)
    whole = client.post("/generate", json={**asked, "stream": False}, headers={"accept": "text/event-stream"})
    assert whole.headers["content-type"] == "application/json"
    assert streamed[-1] == {**whole.json(), "finish_reasons": ["length"]}
    assert streamed[0]["finish_reasons"] == [None]


def test_a_refused_request_for_events_is_an_error_with_its_status(client: Any) -> None:
    answer = client.post("/generate", json={"prompt": ""}, headers={"accept": "text/event-stream"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_the_openapi_document_has_every_field_and_status(client: Any) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/generate"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(FIELDS)
    assert all(value["description"] for value in schema["properties"].values())
    assert schema["properties"]["temperature"]["type"] == "number"
    assert schema["properties"]["stop"] | {"description": ""} == {
        "type": "array", "items": {"type": "string"}, "default": [], "description": "",
    }  # fmt: skip
    assert {"200", "400", "401", "403", "413", "431", "500", "503"} <= set(operation["responses"])
    assert "422" not in operation["responses"]


def test_metrics_and_statistics_tell_of_what_was_generated(client: Any) -> None:
    client.post("/generate", json={"prompt": "Hello", "max_tokens": 4, "ignore_eos": True})
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "cacheflow:time_to_first_token_seconds_bucket{" in metrics.text
    assert 'cacheflow:engine_up{model_name="facebook/opt-125m"} 1.0' in metrics.text
    stats = client.get("/stats").json()
    assert set(stats) == {"model", "engine", "latency"}
    assert stats["engine"]["num_generated_tokens"] >= 4
    assert stats["latency"]["ttft_s"]["p50"] > 0
    view = client.get("/stats/view").json()
    assert set(view) == {"stats", "requests", "blocks"}
    assert len(view["blocks"]) == view["stats"]["num_blocks"]


def test_logit_bias_takes_token_ids_as_json_must_write_them(client: Any, engine: Any) -> None:
    token_id = engine.tokenizer.encode("z", add_bos=False)[0]
    answer = client.post(
        "/generate", json={"prompt": "a", "temperature": 0, "max_tokens": 3, "logit_bias": {str(token_id): 100}}
    )
    assert answer.json() == {"text": ["azzz"]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "max_token": 3}, "max_token"),
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": "a", "stream": 1}, "stream"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias"),
        ({"prompt": "a b " * 400}, "prompt"),
        ({"prompt": "a", "use_beam_search": True}, "best_of"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named(client: Any, fields: dict[str, Any], param: str, stream: bool) -> None:
    error = refusal(client, {"stream": True, **fields} if stream else fields)
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_unknown_field_names_the_one_that_was_meant(client: Any) -> None:
    assert "Did you mean 'max_tokens'?" in refusal(client, {"prompt": "a", "max_token": 3})["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 10_000])
def test_what_is_no_json_object_is_refused(client: Any, body: bytes) -> None:
    assert "request body" in refusal(client, body)["message"]


def test_a_body_over_the_limit_is_refused(client: Any) -> None:
    assert "20000 bytes" in refusal(client, {"prompt": "a" * 20_000}, status=413)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/generate", 405), ("PUT", "/health", 405)]
)
def test_unknown_routes_and_methods_get_the_same_shape_of_error(client: Any, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_running_engine_is_alive_and_ready(client: Any) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_blocks(client: Any, engine: Any, loop: Any, stream: bool) -> None:
    body = json.dumps({"prompt": "Hello", "stream": stream, "max_tokens": 500, "ignore_eos": True, "n": 8}).encode()
    client.post_and_hang_up("/generate", body, after_parts=2 if stream else 0)
    stats = loop.run(engine.stats())
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_without_allowed_origins_no_web_page_may_call(client: Any) -> None:
    answer = client.get("/health", headers=ORIGIN)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_page_of_an_allowed_origin_may_call(engine: Any, app_client: Any) -> None:
    options = SimpleOptions(
        allowed_origins=("https://a.example",), allow_credentials=True, allowed_methods=("POST",), allowed_headers=("x-a",)
    )
    client = app_client(SimpleFrontend.create_app(engine, options))
    headers = client.get("/health", headers=ORIGIN).headers
    assert headers["access-control-allow-origin"] == "https://a.example"
    assert headers["access-control-allow-credentials"] == "true"
    asked = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    assert client.request("OPTIONS", "/generate", headers=asked).status_code == 200
    refused = {**ORIGIN, "access-control-request-method": "PUT"}
    assert client.request("OPTIONS", "/generate", headers=refused).status_code == 400
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": "https://b.example"}).headers


def test_an_error_of_ours_that_nobody_foresaw_tells_nothing_and_carries_cors_headers(engine: Any, app_client: Any) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def generate(self, *_: Any) -> Any:
            raise RuntimeError("secret")

    client = app_client(SimpleFrontend.create_app(Broken(), SimpleOptions(allowed_origins=("https://a.example",))))  # type: ignore[arg-type]
    answer = client.post("/generate", json={"prompt": "a"}, headers=ORIGIN)
    assert answer.status_code == 500
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "secret" not in answer.text
    assert "server's log" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_knows_a_request_by_the_id_that_its_answer_has(engine: Any, app_client: Any, stream: bool) -> None:
    known = []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
            known.append(request_id)
            return engine.generate(prompt, params, request_id)

    client = app_client(SimpleFrontend.create_app(Noting(), SimpleOptions()))  # type: ignore[arg-type]
    asked = {"prompt": "a", "max_tokens": 2, "stream": stream}
    drawn = client.post("/generate", json=asked)
    given = [client.post("/generate", json=asked, headers={"x-request-id": "mine"}) for _ in range(2)]
    assert [answer.status_code for answer in (drawn, *given)] == [200, 200, 200]
    assert known[0] == drawn.headers["x-request-id"]
    assert [answer.headers["x-request-id"] for answer in given] == ["mine", "mine"]
    assert all(name.startswith("mine-") for name in known[1:])


def test_the_page_needs_no_key_and_everything_else_does(engine: Any, app_client: Any) -> None:
    client = app_client(SimpleFrontend.create_app(engine, SimpleOptions(api_key=("k",))))
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert [client.get(path).status_code for path in ("/health", "/stats", "/metrics", "/openapi.json")] == [200, 401, 401, 401]
