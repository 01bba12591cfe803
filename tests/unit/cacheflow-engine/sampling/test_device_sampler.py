"""Choices on the device: the same as the sampler's, and nothing is read back before the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cacheflow.errors import InvalidRequestError, RequestFailedError
from cacheflow.interfaces import SampleSpec
from cacheflow.sampling import device_sampler
from cacheflow.sampling.device_sampler import choose
from cacheflow.sampling.sampler import Sampler
from cacheflow.sampling.transfer import Download, pack, unpack
from cacheflow.types import SamplingParams

VOCAB_SIZE = 700
WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique", "is_nonzero")
"""Operations whose results the host must know before it goes on."""


class _Context:
    vocab_size = VOCAB_SIZE
    eos_token_ids = (2,)

    def special_token_ids(self) -> frozenset[int]:
        return frozenset()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def token_bytes(self) -> list[bytes]:
        return []


class _NoWaiting(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        assert name.split("_out")[0] not in WAITING, f"{name} waits for the device"
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in indices), f"{name} with a mask waits for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise AssertionError("values were read before the end")

    with monkeypatch.context() as patch, _NoWaiting():
        for method in ("tolist", "item", "cpu", "numpy", "__bool__"):
            patch.setattr(torch.Tensor, method, refuse)
        yield


def _specs(*params: SamplingParams, outputs: Sequence[Sequence[int]] = ()) -> list[SampleSpec]:
    return [
        SampleSpec(
            sequence_id=i,
            request_index=i,
            index=0,
            params=each,
            prompt_token_ids=[5, 6, 7],
            output_token_ids=list(outputs[i]) if outputs else [9, 9, 11],
        )
        for i, each in enumerate(params)
    ]


PARAMS = (
    SamplingParams(temperature=0.0, seed=0),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.5, seed=2, top_k=7),
    SamplingParams(temperature=0.9, seed=3, top_p=0.8),
    SamplingParams(temperature=1.2, seed=4, top_k=600, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1.0, seed=5, min_p=0.2),
    SamplingParams(temperature=0.8, seed=6, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, seed=7, logprobs=5),
    SamplingParams(temperature=1.0, seed=8, logprobs=2, top_p=0.99),
    SamplingParams(temperature=0.0, seed=9, logit_bias={17: 100.0}),
    SamplingParams(temperature=1.0, seed=10, allowed_token_ids=[3, 4, 650]),
    SamplingParams(temperature=0.0, seed=11, logprobs=0),
)


def _logits(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_choices_are_those_of_the_sampler(seed: int, dtype: torch.dtype) -> None:
    specs, logits = _specs(*PARAMS), _logits(len(PARAMS), seed, dtype)
    rows = [(5 * i) % len(specs) for i in range(len(specs))]
    expected = Sampler(_Context()).sample(logits, rows, specs)
    choices = choose(Sampler(_Context()), logits, rows, specs)
    samples = choices.samples()
    assert choices.token_ids.tolist() == [sample.token_ids[0] for sample in samples]
    for found, wanted in zip(samples, expected, strict=True):
        assert found.token_ids == wanted.token_ids
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        assert found.scores == pytest.approx(wanted.scores, abs=1e-5)
        assert (found.top_logprobs is None) == (wanted.top_logprobs is None)
        for ours, theirs in zip(found.top_logprobs or [], wanted.top_logprobs or [], strict=True):
            assert list(ours) == list(theirs)
            assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)


def test_long_sorts_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    specs, logits = _specs(*[PARAMS[3], PARAMS[8]] * 4), _logits(8)
    expected = choose(Sampler(_Context()), logits, range(8), specs).samples()
    monkeypatch.setattr(device_sampler, "MAX_SORTED_ELEMENTS", 3 * VOCAB_SIZE)
    assert choose(Sampler(_Context()), logits, range(8), specs).samples() == expected


def test_the_host_waits_for_nothing_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    specs, logits, sampler = _specs(*PARAMS), _logits(len(PARAMS)), Sampler(_Context())
    expected = choose(sampler, logits, range(len(specs)), specs).samples()
    with nothing_is_waited_for(monkeypatch):
        choices = choose(sampler, logits, range(len(specs)), specs)
    assert choices.samples() == expected


def test_a_plain_sampler_would_be_caught_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    specs, logits = _specs(*PARAMS), _logits(len(PARAMS))
    with pytest.raises(AssertionError), nothing_is_waited_for(monkeypatch):
        Sampler(_Context()).sample(logits, range(len(specs)), specs)


def test_everything_comes_back_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    class Counted(Download):
        def __init__(self, values: torch.Tensor) -> None:
            downloads.append(values)
            super().__init__(values)

    monkeypatch.setattr(device_sampler, "Download", Counted)
    choose(Sampler(_Context()), _logits(len(PARAMS)), range(len(PARAMS)), _specs(*PARAMS)).samples()
    assert len(downloads) == 1


def test_beams_and_others_are_chosen_in_one_step() -> None:
    beam = SamplingParams(use_beam_search=True, best_of=2, temperature=0.0, seed=0)
    specs = _specs(PARAMS[1], beam, PARAMS[7])
    specs[1] = SampleSpec(
        sequence_id=1, request_index=1, index=0, params=beam, prompt_token_ids=[5], output_token_ids=[], num_candidates=4
    )
    logits = _logits(3)
    expected = Sampler(_Context()).sample(logits, range(3), specs)
    choices = choose(Sampler(_Context()), logits, range(3), specs)
    assert [s.token_ids for s in choices.samples()] == [s.token_ids for s in expected]
    assert choices.token_ids.tolist() == [s.token_ids[0] for s in expected]


def test_logits_that_are_no_numbers_fail_when_they_are_read() -> None:
    logits = _logits(2)
    logits[1, 3] = math.nan
    choices = choose(Sampler(_Context()), logits, range(2), _specs(PARAMS[0], PARAMS[1]))
    with pytest.raises(RequestFailedError, match="not numbers"):
        choices.samples()


def test_a_request_that_allows_no_token_is_told_so() -> None:
    params = SamplingParams(temperature=0.0, seed=0, allowed_token_ids=[2], min_tokens=9)
    choices = choose(Sampler(_Context()), _logits(2), range(2), _specs(PARAMS[0], params))
    with pytest.raises(InvalidRequestError, match="allows no token after 3 tokens.*AllowedTokenIds, MinTokens"):
        choices.samples()


def test_tokens_not_known_yet_count_as_generated() -> None:
    logits = _logits(1)
    known = _specs(PARAMS[1], outputs=[[9, 9, 11, 12]])
    unknown = [
        SampleSpec(
            sequence_id=0,
            request_index=0,
            index=0,
            params=PARAMS[1],
            prompt_token_ids=[5],
            output_token_ids=[9, 9, 11],
            num_unknown=1,
        )
    ]
    assert (
        choose(Sampler(_Context()), logits, [0], unknown).samples() == choose(Sampler(_Context()), logits, [0], known).samples()
    )


def test_arrays_of_any_dtype_are_packed_into_one_transfer() -> None:
    arrays = [
        np.arange(3, dtype=np.int64),
        np.ones((3, 5), np.int32),
        np.zeros(0, np.int64),
        np.array([[0.5]], np.float32),
        np.array([1e300]),
    ]
    packed = pack(arrays, is_pinned=False)
    for array, part in zip(arrays, unpack(packed, arrays), strict=True):
        assert part.data_ptr() % 16 == 0 or part.numel() == 0
        assert np.array_equal(part.numpy(), array)
        assert part.numpy().dtype == array.dtype
