from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestFailedError,
)
from cacheflow.service import wire
from cacheflow.types import (
    EngineRequest,
    EngineStats,
    ModelInfo,
    RequestUpdate,
    SamplingParams,
    SequenceUpdate,
    TokenizerData,
)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
token_ids = st.integers(0, 2**31)
floats = st.floats(allow_nan=False, width=32)
logprobs = st.dictionaries(token_ids, floats, max_size=3)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | floats | names | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    best_of=st.none() | st.integers(4, 128),
    presence_penalty=st.floats(-2, 2),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 100),
    seed=st.none() | st.integers(0, 2**63 - 1),
    early_stopping=st.sampled_from([True, False, "never"]),
    stop=st.lists(names.filter(bool), max_size=3),
    stop_token_ids=st.lists(token_ids, max_size=3),
    max_tokens=st.none() | st.integers(1, 2**40),
    logprobs=st.none() | st.integers(0, 20),
    logit_bias=st.none() | st.dictionaries(token_ids, st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=1, max_size=3),
    extra=st.dictionaries(names, plain, max_size=3),
)
requests = st.builds(
    EngineRequest,
    request_id=names,
    prompt_token_ids=st.lists(token_ids, max_size=6),
    params=params,
    arrival_s=floats,
    client_id=names,
    priority=st.integers(-(2**31), 2**31),
    cache_salt=names,
)
sequence_updates = st.builds(
    SequenceUpdate,
    index=st.integers(0, 127),
    new_token_ids=st.lists(token_ids, max_size=3),
    cumulative_logprob=floats,
    new_logprobs=st.none() | st.lists(logprobs, max_size=3),
    finish_reason=st.none() | names,
    stop_reason=st.none() | token_ids,
)
updates = st.builds(
    RequestUpdate,
    request_id=names,
    sequences=st.lists(sequence_updates, max_size=3),
    finished=st.booleans(),
    new_prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3),
    num_cached_tokens=st.integers(0, 2**31),
    client_id=names,
    error=st.none() | names,
    is_invalid=st.booleans(),
    param=st.none() | names,
)
infos = st.builds(
    ModelInfo,
    model=names,
    architecture=names,
    dtype=names,
    vocab_size=token_ids,
    max_model_len=token_ids,
    max_num_seqs=token_ids,
    tokenizer=st.builds(
        TokenizerData,
        tokenizer_json=names,
        chat_template=st.none() | names,
        special_tokens=st.dictionaries(names, names, max_size=2),
        bos_token_id=st.none() | token_ids,
        eos_token_ids=st.lists(token_ids, max_size=2),
        add_bos=st.booleans(),
    ),
    engine_version=names,
)
stats = st.builds(EngineStats, **{name: st.integers(0, 2**50) for name in EngineStats.__dataclass_fields__})
client_messages = st.one_of(
    st.builds(wire.Hello, protocol_version=st.integers(0, 99), client_id=names),
    st.builds(wire.Abort, request_id=names, index=st.none() | st.integers(0, 127)),
    st.sampled_from([wire.StatsRequest(), wire.Ping(), wire.Goodbye()]),
)
engine_messages = st.one_of(
    st.builds(wire.Loading, elapsed_s=floats),
    st.builds(wire.LoadFailed, kind=names, error=names),
    st.builds(wire.Rejected, error=names),
    st.builds(wire.Welcome, protocol_version=st.integers(0, 99), info=infos),
    st.builds(wire.Updates, updates=st.lists(updates, max_size=3)),
    st.builds(
        wire.Refused,
        request_id=names,
        error=names,
        is_invalid=st.booleans(),
        param=st.none() | names,
        retry_after_s=st.none() | floats,
    ),
    st.builds(wire.StatsReply, stats=stats),
    st.just(wire.Unknown()),
)


@given(client_messages)
def test_what_a_client_says_arrives_as_it_was_said(message: wire.ClientMessage) -> None:
    assert wire.decode_client_message(wire.encode_client_message(message)) == message


@given(engine_messages)
def test_what_an_engine_says_arrives_as_it_was_said(message: wire.EngineMessage) -> None:
    assert wire.decode_engine_message(wire.encode_engine_message(message)) == message


@given(requests)
def test_a_request_arrives_as_it_was_submitted(request: EngineRequest) -> None:
    message = wire.decode_client_message(wire.pack_request(request))
    assert isinstance(message, wire.Submit)
    assert wire.unpack_request(message) == request


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    for decode in (wire.decode_client_message, wire.decode_engine_message):
        with contextlib.suppress(wire.MalformedMessageError):
            decode(data)


@given(requests, st.data())
def test_a_damaged_request_is_a_request_or_invalid(request: EngineRequest, data: st.DataObject) -> None:
    packed = bytearray(msgspec.msgpack.encode(request))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidRequestError):
        wire.unpack_request(wire.Submit(request.request_id, msgspec.Raw(bytes(packed))))


@pytest.mark.parametrize("data", [b"\xdd\xff\xff\xff\xff", b"\x81\xa4type\xa7Updates", b"\x91" * 100_000])
def test_lengths_that_the_bytes_do_not_have_are_malformed(data: bytes) -> None:
    with pytest.raises(wire.MalformedMessageError, match=f"{len(data)} bytes that are no message"):
        wire.decode_engine_message(data)


def test_a_parameter_out_of_range_is_refused_by_name_on_arrival() -> None:
    values = msgspec.to_builtins(request_with())
    values["params"]["temperature"] = -1.0
    message = wire.Submit("r", msgspec.Raw(msgspec.msgpack.encode(values)))
    with pytest.raises(InvalidRequestError, match="temperature must be a number from 0 to 100, got -1.0") as raised:
        wire.unpack_request(message)
    assert raised.value.param == "temperature"


def test_a_request_under_another_id_than_its_message_is_refused() -> None:
    message = wire.Submit("other", msgspec.Raw(msgspec.msgpack.encode(request_with())))
    with pytest.raises(InvalidRequestError, match="another id"):
        wire.unpack_request(message)


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        ({"grammar": {1, 2}}, r"extra\['grammar'\] .* set"),
        ({"a": [0, object()]}, r"extra\['a'\]\[1\] .* object"),
        ({"a": 2**64}, r"extra\['a'\] .* int"),
        ({"a": {1: 2}}, r"extra\['a'\] .* dict"),
    ],
)
def test_extra_values_that_messagepack_has_not_are_refused_by_their_place(extra: dict[str, object], path: str) -> None:
    with pytest.raises(InvalidRequestError, match=path) as raised:
        wire.pack_request(request_with(extra=extra))
    assert raised.value.param == "extra"


def test_extra_values_that_nest_without_end_are_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(InvalidRequestError, match="at most 16 levels deep"):
        wire.pack_request(request_with(extra={"a": endless}))


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="can't be sent to the engine: .*surrogates"):
        wire.pack_request(request_with(stop=["\ud800"]))


def test_a_request_larger_than_a_message_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_CLIENT_MESSAGE_BYTES", 1000)
    with pytest.raises(InvalidRequestError, match=r"takes \d{4} bytes, the engine accepts 1000"):
        wire.pack_request(request_with(extra={"a": b"x" * 1000}))


def test_messages_over_the_limit_are_refused_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    data = wire.encode_engine_message(wire.Rejected("x" * 100))
    monkeypatch.setattr(wire, "MAX_ENGINE_MESSAGE_BYTES", 50)
    monkeypatch.setattr(wire, "MAX_CLIENT_MESSAGE_BYTES", 50)
    with pytest.raises(wire.MalformedMessageError, match="a client takes 50"):
        wire.encode_engine_message(wire.Rejected("x" * 100))
    for decode in (wire.decode_client_message, wire.decode_engine_message):
        with pytest.raises(wire.MalformedMessageError, match="more than the 50 allowed"):
            decode(data)


@pytest.mark.parametrize("error", [ModelNotFoundError, CheckpointError, ConfigError])
def test_a_load_error_keeps_its_class_and_text(error: type[Exception]) -> None:
    raised = wire.LoadFailed(error.__name__, "no such model").exception()
    assert type(raised) is error
    assert str(raised) == "no such model"


def test_a_load_error_of_a_foreign_class_becomes_ours_with_its_name() -> None:
    raised = wire.LoadFailed("SystemError", "boom").exception()
    assert type(raised) is EngineDeadError
    assert "SystemError: boom" in str(raised)


def test_a_refusal_tells_whose_fault_it_is() -> None:
    assert isinstance(wire.Refused("r", "bad", is_invalid=True, param="n").exception(), InvalidRequestError)
    overloaded = wire.Refused("r", "full", retry_after_s=3.0).exception()
    assert isinstance(overloaded, EngineOverloadedError)
    assert overloaded.retry_after_s == 3.0
    assert isinstance(wire.Refused("r", "boom").exception(), RequestFailedError)


def request_with(**values: object) -> EngineRequest:
    return EngineRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams(**values), arrival_s=0.0)  # type: ignore[arg-type]
