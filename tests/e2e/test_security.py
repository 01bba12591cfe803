"""What other serving engines were broken by (CVEs and issues of 2024 to 2026), tried on real servers with a tiny model.

One engine process serves both frontends here; the simple one has API keys, the OpenAI-compatible one has none. Each test
names the reports that it stands for. These have their tests elsewhere, because they need no server:

| report | what | where |
| --- | --- | --- |
| CVE-2025-59425 | the key compared in non-constant time | unit/cacheflow-engine/test_edge.py |
| CVE-2026-53923 | GGUF dimensions that overflow | unit/cacheflow-engine/loading |
| CVE-2025-25183 | colliding prefix-cache keys | unit/cacheflow-engine/kvcache (keys are sha256) |
| CVE-2025-48942, -48943, -48944, -32381, -29770 | schemas and patterns that crash or fill the disk | structured output's |

These don't apply: CVE-2025-9141 beyond "no `eval` in the source" (no tool call is executed); CVE-2025-46722 (no images);
CVE-2026-44223 (no speculation).
"""

from __future__ import annotations

import ast
import http.client
import json
import os
import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import zmq
from programs import DEADLINE_S, Program

PACKAGES = Path(__file__).parents[2] / "packages"
KEYS = ("first-key", "second-key")
OPEN = {"authorization": f"Bearer {KEYS[1]}"}
MODEL = ("--model", "facebook/opt-125m", "--dtype", "float32", "--kv-cache-memory", "0.05", "--disable-log-stats")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("security")


@pytest.fixture(scope="module")
def engine_address(folder: Path, hub_cache: Path) -> Iterator[str]:
    address = f"ipc://{folder}/engine"
    program = Program(folder / "engine.log", hub_cache, "engine", *MODEL, "--listen", address)
    yield address
    program.stop()


@pytest.fixture(scope="module")
def simple(folder: Path, hub_cache: Path, engine_address: str) -> Iterator[httpx.Client]:
    """A client without a key of a server that has two."""
    arguments = ("serve", "simple", "--engine", engine_address, "--port", "0", "--metrics-port", "0")
    program = Program(folder / "simple.log", hub_cache, *arguments, CACHEFLOW_API_KEY=",".join(KEYS))
    try:
        url = program.wait_for_url()
        with httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
            yield client
        assert program.process.poll() is None, program.log.read_text()
    finally:
        program.stop()


@pytest.fixture(scope="module")
def openai(folder: Path, hub_cache: Path, engine_address: str) -> Iterator[httpx.Client]:
    program = Program(folder / "openai.log", hub_cache, "serve", "openai", "--engine", engine_address, "--port", "0")
    try:
        with httpx.Client(base_url=program.wait_for_url(), timeout=DEADLINE_S) as client:
            yield client
        assert program.process.poll() is None, program.log.read_text()
    finally:
        program.stop()


def generate(client: httpx.Client, fields: dict[str, Any] | bytes, **headers: str) -> httpx.Response:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return client.post("/generate", content=body, headers={**OPEN, **headers})


def assert_serves(simple: httpx.Client) -> None:
    answer = generate(simple, {"prompt": "Hello", "max_tokens": 2, "temperature": 0})
    assert answer.status_code == 200, answer.text


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_pickles_on_the_engines_socket_are_not_unpickled(simple: httpx.Client, engine_address: str, tmp_path: Path) -> None:
    """CVE-2025-32444, -29783, -30165, -47277, CVE-2024-9052, -11041; SGLang's CVE-2025-10164, CVE-2026-3059, -3060, -3989."""
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))
    with zmq.Context() as context, context.socket(zmq.DEALER) as connection:
        connection.linger = 1000
        connection.connect(engine_address)
        for frames in ([bomb], [b"", bomb], [bomb, bomb], [bomb] * 50, [b"\xc1"], [b"\x81" * 1000]):
            connection.send_multipart(frames)
        assert_serves(simple)
    assert not marker.exists()


def test_a_checkpoint_can_not_run_code(tmp_path: Path, hub_cache: Path) -> None:
    """CVE-2025-24357: `torch.load` without weights_only."""
    import torch
    from tiny import write_tiny_opt

    marker = tmp_path / "marker"
    model = write_tiny_opt(tmp_path / "model")
    torch.save({"model.decoder.embed_tokens.weight": Bomb(marker)}, model / "pytorch_model.bin")
    program = Program(tmp_path / "log", hub_cache, "engine", "--model", str(model), "--listen", f"ipc://{tmp_path}/engine")
    assert program.process.wait(DEADLINE_S) == 1
    assert not marker.exists()
    assert "Traceback" not in program.log.read_text()


def test_a_models_own_code_is_not_run(tmp_path: Path, hub_cache: Path) -> None:
    """CVE-2025-66448, CVE-2026-22807, CVE-2026-27893: code of the model's repository, although it is not trusted."""
    from tiny import write_tiny_llama

    marker = tmp_path / "marker"
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    model = write_tiny_llama(tmp_path / "model", auto_map=classes)
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    tokenizer_config = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    program = Program(tmp_path / "log", hub_cache, "serve", "simple", "--model", str(model), "--port", "0", *MODEL[2:])
    try:
        with httpx.Client(base_url=program.wait_for_url(), timeout=DEADLINE_S) as client:
            assert client.post("/generate", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
    finally:
        program.stop()
    assert not marker.exists()


def test_tensors_are_not_taken_from_clients(simple: httpx.Client, openai: httpx.Client) -> None:
    """CVE-2025-62164, GHSA-mcmc-2m55-j8jj: prompt_embeds through `torch.load`."""
    assert refusal(generate(simple, {"prompt_embeds": "gASVCA=="}))["param"] == "prompt_embeds"
    assert refusal(openai.post("/v1/completions", json={"prompt_embeds": "gASVCA=="}))["param"] == "prompt"


@pytest.mark.parametrize(
    "body", [b"{", b"\x00" * 100, b'{"prompt": 1}', b'{"prompt": "a", "seed": "0x7f"}', b'{"prompt": [1e99]}']
)
def test_an_error_tells_nothing_of_the_inside(simple: httpx.Client, openai: httpx.Client, body: bytes) -> None:
    """CVE-2026-22778: a heap address in an error's text."""
    for answer in (generate(simple, body), openai.post("/v1/completions", content=body)):
        text = refusal(answer)["message"]
        assert not any(word in text for word in ("Traceback", " object at 0x", "/src/", ".py", "site-packages"))


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/generate",
        "/metrics",
        "/stats",
        "/stats/view",
        "/openapi.json",
        "/invocations",
        "/v1/completions",
        "/generate/",
        "/page",
    ],
)
def test_no_route_but_the_open_ones_answers_without_a_key(simple: httpx.Client, method: str, path: str) -> None:
    """vllm#18892, #18893, #55536, #58028, #58144: routes that bypass the key."""
    assert refusal(simple.request(method, path), 401)["code"] == "invalid_api_key"


def test_every_key_of_several_opens_and_nothing_else(simple: httpx.Client) -> None:
    """CVE-2025-59425, from outside."""
    statuses = [
        simple.get("/stats", headers={"authorization": f"Bearer {key}"}).status_code for key in (*KEYS, KEYS[0][:-1], "x")
    ]
    assert statuses == [200, 200, 401, 401]


def test_a_key_of_the_environment_stands_on_no_command_line(simple: httpx.Client) -> None:
    assert simple.get("/health").status_code == 200
    own = os.getuid()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.stat().st_uid == own:
                assert KEYS[0].encode() not in entry.read_bytes()
        except OSError:
            continue  # It has ended.


def test_health_is_open_and_metrics_are_on_their_own_port(simple: httpx.Client, folder: Path) -> None:
    assert simple.get("/health").status_code == simple.get("/health/ready").status_code == 200
    url = (folder / "simple.log").read_text().partition("Metrics at ")[2].split()[0]
    assert "cacheflow:num_requests_running" in httpx.get(url).text
    for path in ("/generate", "/stats", "/"):
        assert httpx.get(url.removesuffix("/metrics") + path).status_code == 401


@pytest.mark.parametrize("field", ["n", "best_of"])
@pytest.mark.parametrize("value", [129, 10**6, 2**63, 10**400])
def test_the_number_of_sequences_is_bounded(simple: httpx.Client, openai: httpx.Client, field: str, value: int) -> None:
    """CVE-2024-8939, CVE-2026-34756."""
    asked = {"prompt": "a", field: value}
    assert refusal(generate(simple, asked))["param"] == field
    assert refusal(openai.post("/v1/completions", json=asked))["param"] == field


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], None])
def test_an_empty_prompt_is_refused_and_nothing_more(simple: httpx.Client, openai: httpx.Client, prompt: Any) -> None:
    """CVE-2024-8768."""
    assert refusal(generate(simple, {"prompt": prompt}))["param"] == "prompt"
    assert refusal(openai.post("/v1/completions", json={"prompt": prompt}))["param"] == "prompt"
    assert_serves(simple)


def test_nothing_that_a_client_sends_takes_long_to_refuse(simple: httpx.Client) -> None:
    """CVE-2025-48887, GHSA-j828-28rj-hfhp, CVE-2025-46560: quadratic parsing. Megabytes, refused while others are served."""
    bodies = (
        b"[" * 4_000_000,
        b'{"a":' * 1_000_000,
        b'{"prompt": "' + b"a" * 4_000_000 + b'"}',
        b'{"n": ' + b"9" * 4_000_000 + b"}",
    )
    for body in bodies:
        refusal(generate(simple, body))
    assert_serves(simple)


def test_a_client_can_not_bring_a_template(openai: httpx.Client) -> None:
    """CVE-2025-62426, CVE-2025-61620: a template of the client's, which never ends."""
    template = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"
    asked = {"messages": [{"role": "user", "content": template}], "chat_template": template, "max_tokens": 1}
    started = time.monotonic()
    openai.post("/v1/chat/completions", json={**asked, "chat_template_kwargs": {"chat_template": template, "tokenize": True}})
    assert openai.get("/health").status_code == 200
    assert time.monotonic() - started < DEADLINE_S


@pytest.mark.parametrize("num_bytes", [20_000, 2_000_000])
def test_huge_headers_are_refused(simple: httpx.Client, num_bytes: int) -> None:
    """CVE-2025-48956."""
    where = urlsplit(str(simple.base_url))
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=DEADLINE_S)
    try:
        connection.request("GET", "/health", headers={"X-Long": "a" * num_bytes})
        assert connection.getresponse().status == 431
    except (ConnectionError, http.client.RemoteDisconnected):
        pass  # It hung up while the rest was still being sent.
    finally:
        connection.close()
    assert_serves(simple)


def test_a_header_that_never_ends_is_cut_off(simple: httpx.Client) -> None:
    where = urlsplit(str(simple.base_url))
    with socket.create_connection((where.hostname, where.port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            connection.sendall(b"a" * 50_000_000)
    assert_serves(simple)


def test_a_huge_body_is_refused(simple: httpx.Client, openai: httpx.Client) -> None:
    body = b'{"prompt": "' + b"a" * 9_000_000 + b'"}'
    refusal(generate(simple, body), 413)
    refusal(openai.post("/v1/completions", content=body), 413)

    def parts() -> Iterator[bytes]:
        for _ in range(10):
            yield b"a" * 1_000_000

    refusal(simple.post("/generate", content=parts(), headers=OPEN), 413)


def test_a_salt_keeps_prompts_of_others_out_of_reach(openai: httpx.Client) -> None:
    """CVE-2025-46570: whether a prompt is cached can be seen in its time, so salts isolate tenants."""

    def num_cached(salt: str) -> int:
        asked = {"prompt": list(range(10, 90)), "max_tokens": 1, "temperature": 0, "cache_salt": salt}
        usage = openai.post("/v1/completions", json=asked).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert num_cached("ann") == 0
    assert num_cached("ann") > 0
    assert num_cached("bob") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["x"] * 500_000),
        ("stop", "x" * 100_000),
        ("bad_words", ["x"] * 50_000),
        ("stop_token_ids", [1] * 100_000),
        ("logit_bias", {str(i): 1 for i in range(100_000)}),
        ("prompt_logprobs", -1),
        ("logprobs", 10_000),
        ("extra", {str(i): 1 for i in range(1000)}),
    ],
)
def test_every_list_and_count_is_bounded(simple: httpx.Client, openai: httpx.Client, field: str, value: Any) -> None:
    """vllm#51447, #54721, local-inference-lab/vllm#264."""
    asked = {"prompt": "a", field: value}
    assert refusal(generate(simple, asked))["param"] == field
    assert refusal(openai.post("/v1/completions", json=asked))["param"] == field


@pytest.mark.parametrize("path", ["/update_weights", "/update_weights_from_tensor", "/v1/load_lora_adapter", "/collective_rpc"])
def test_there_is_no_door_to_the_weights(simple: httpx.Client, openai: httpx.Client, path: str) -> None:
    """SGLang's CVE-2026-7301 and its like: pickles over HTTP."""
    assert simple.post(path, headers=OPEN, content=pickle.dumps({})).status_code == 404
    assert openai.post(path, content=pickle.dumps({})).status_code == 404


NUMBERS = ("NaN", "Infinity", "1e999", "-1e999", "1e308", "-1e308", "1e-320", "-0.0", "true", '"1"', "[]", "9" * 400)


@pytest.mark.parametrize("number", NUMBERS)
def test_no_number_hangs_the_server(simple: httpx.Client, number: str) -> None:
    """llama.cpp#19367: sampling floats that were not validated."""
    names = (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "length_penalty",
        "seed",
    )
    for name in names:
        answer = generate(simple, f'{{"prompt": "a", "max_tokens": 2, "{name}": {number}}}'.encode())
        # A divisor of nearly nothing makes logits that are no numbers: that request alone fails, with an error of ours.
        is_told = answer.status_code == 500 and answer.json()["error"]["code"] == "request_failed"
        assert answer.status_code in (200, 400) or is_told, (name, answer.text)
    assert_serves(simple)


@pytest.mark.parametrize("name", ["simple", "openai"])
def test_no_web_page_can_drive_a_server(request: pytest.FixtureRequest, name: str) -> None:
    """DNS rebinding and requests across origins: a page in a browser on this machine reaches localhost too."""
    client: httpx.Client = request.getfixturevalue(name)
    path = {"simple": "/generate", "openai": "/v1/completions"}[name]
    asked = {"prompt": "a", "max_tokens": 1}
    rebound = client.post(path, json=asked, headers={**OPEN, "host": "evil.example"})
    assert refusal(rebound, 403)["code"] == "host_not_allowed"
    foreign = client.post(path, json=asked, headers={**OPEN, "origin": "https://evil.example"})
    assert refusal(foreign, 403)["code"] == "origin_not_allowed"
    own = client.post(path, json=asked, headers={**OPEN, "origin": str(client.base_url).rstrip("/")})
    assert own.status_code == 200, own.text


def test_the_source_evaluates_no_text_and_unpickles_nothing() -> None:
    """CVE-2025-9141 (`eval` in a tool parser), CVE-2025-24357, and every pickle above."""
    found = []
    for file in PACKAGES.glob("*/src/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            is_weights_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in ("eval", "exec", "__import__") or (name == "torch.load" and not is_weights_only):
                found.append(f"{file.name}:{node.lineno}: {name}")
            if name.partition(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve"):
                found.append(f"{file.name}:{node.lineno}: {name}")
    assert found == []
