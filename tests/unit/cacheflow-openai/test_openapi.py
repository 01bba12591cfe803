"""The OpenAPI document says what the routes take and answer."""

from __future__ import annotations

from typing import Any

import pytest

from cacheflow.status import PATHS
from cacheflow.types import SAMPLING_FIELDS
from cacheflow_openai import chat_schema, embeddings, responses_schema, schema, tokens
from cacheflow_openai.app import OpenAIFrontend, OpenAIOptions
from cacheflow_openai.openapi import POST_ROUTES, SAMPLING, openapi_document

DOCUMENT = openapi_document(OpenAIOptions(), ["m"])
NOT_IN_A_CHAT = set(chat_schema.NO_SAMPLING_FIELDS)
FIELDS = {
    "/v1/completions": {*schema.OWN_FIELDS, *SAMPLING_FIELDS},
    "/v1/chat/completions": {*chat_schema.OWN_FIELDS, *SAMPLING_FIELDS} - NOT_IN_A_CHAT,
    "/v1/embeddings": set(embeddings.OWN_FIELDS),
    "/tokenize": set(tokens.TOKENIZE_FIELDS),
    "/detokenize": set(tokens.DETOKENIZE_FIELDS),
}


def properties(path: str) -> dict[str, Any]:
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    found: dict[str, Any] = body["properties"]
    return found


def test_every_sampling_parameter_is_described() -> None:
    assert set(SAMPLING) == set(SAMPLING_FIELDS)


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_that_a_route_reads_is_described(path: str) -> None:
    assert set(properties(path)) == FIELDS[path]


def test_the_fields_of_responses_are_described() -> None:
    known = {*responses_schema.OWN_FIELDS, *SAMPLING_FIELDS} - set(responses_schema.REFUSED_FIELDS)
    refused = {"conversation", "background"}
    assert set(properties("/v1/responses")) <= known
    assert set(responses_schema.OWN_FIELDS) - set(properties("/v1/responses")) == refused


def test_every_route_is_described(engine: Any) -> None:
    guard = OpenAIFrontend.create_app(engine, OpenAIOptions())
    routes = {route.path.replace("{name:path}", "{model}") for route in guard._app._app.routes}
    assert routes - {"/openapi.json"} | set(PATHS) == set(DOCUMENT["paths"])


@pytest.mark.parametrize("path", POST_ROUTES)
def test_every_route_that_takes_a_body_says_how_it_may_be_refused(path: str) -> None:
    assert {"200", "400", "401", "404", "413", "415", "500", "503"} <= set(DOCUMENT["paths"][path]["post"]["responses"])


def test_keys_and_a_root_path_are_told() -> None:
    document = openapi_document(OpenAIOptions(api_key=("k",), root_path="/llm"), ["m"])
    assert document["servers"] == [{"url": "/llm"}]
    assert document["security"] == [{"key": []}]
    assert "security" not in DOCUMENT


def test_the_document_is_served(client_with_key: Any) -> None:
    assert client_with_key.get("/openapi.json").status_code == 401
    answer = client_with_key.get("/openapi.json", headers={"authorization": "Bearer k"})
    assert answer.json()["openapi"] == "3.1.0"
    assert "/v1/chat/completions" in answer.json()["paths"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/version", "/metrics", "/", "/health/readyx"])
def test_without_a_key_every_route_is_closed(client_with_key: Any, path: str) -> None:
    answer = client_with_key.get(path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_without_a_key_health_is_told(client_with_key: Any, path: str) -> None:
    assert client_with_key.get(path).status_code == 200


@pytest.fixture(scope="session")
def client_with_key(engine: Any, app_client: Any) -> Any:
    return app_client(OpenAIFrontend.create_app(engine, OpenAIOptions(api_key=("j", "k"))))
