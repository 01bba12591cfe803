"""Choosing tokens: ties, seeds, distributions, log probabilities, candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cacheflow.errors import InvalidRequestError, RequestFailedError
from cacheflow.interfaces import OpSpec, Sample, SampleSpec
from cacheflow.plugins import find_plugins, load_plugin
from cacheflow.sampling import sampler as sampler_module
from cacheflow.sampling.sampler import Sampler
from cacheflow.types import SamplingParams

VOCAB_SIZE = 1000
NUM_DRAWS = 4000


@pytest.fixture(params=["own operations", "a provider's"])
def sampler(request: pytest.FixtureRequest, context: Any) -> Sampler:
    return Sampler(context) if request.param == "own operations" else _with_provider(context)


def _with_provider(context: Any) -> Sampler:
    """One that chooses through the first op provider installed that can draw on a CPU."""
    for name in find_plugins("cacheflow.op_providers"):
        provider = load_plugin("cacheflow.op_providers", name)
        spec = OpSpec(dtype=torch.float32, device=torch.device("cpu"))
        if hasattr(provider, "supports") and not provider.supports(spec) and hasattr(found := provider(spec), "draw_rows"):
            return Sampler(context, found.row_maxima, found.draw_rows)
    pytest.skip("no op provider installed has draw_rows on a CPU")


def _spec(
    params: SamplingParams, *, request: int = 0, index: int = 0, output: Sequence[int] = (), num_candidates: int = 0
) -> SampleSpec:
    return SampleSpec(
        sequence_id=1000 * request + index,
        request_index=request,
        index=index,
        params=params,
        prompt_token_ids=[11, 12, 13],
        output_token_ids=list(output),
        num_candidates=num_candidates,
    )


def _params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 0, "max_tokens": 100, **values})


def _logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def _tokens(samples: list[Sample]) -> list[int]:
    return [sample.token_ids[0] for sample in samples]


def _frequencies(sampler: Sampler, row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """How often each token is drawn from one row of logits, over many sequences of a request."""
    specs = [_spec(params, index=i) for i in range(NUM_DRAWS)]
    tokens = _tokens(sampler.sample(row[None], [0] * NUM_DRAWS, specs))
    return torch.bincount(torch.tensor(tokens), minlength=len(row)) / NUM_DRAWS


def _small_row(*probabilities: float) -> torch.Tensor:
    """A row whose first tokens have these probabilities, and all others none."""
    row = torch.full((VOCAB_SIZE,), -math.inf)
    row[: len(probabilities)] = torch.tensor(probabilities).log()
    return row


# Greedy


def test_of_equal_logits_greedy_takes_the_lowest_id(sampler: Sampler) -> None:
    logits = torch.zeros(2, VOCAB_SIZE, dtype=torch.bfloat16)
    logits[0, [998, 700, 31]] = 5
    logits[1, 999] = 5
    assert _tokens(sampler.sample(logits, [0, 1], [_spec(_params(temperature=0.0))] * 2)) == [31, 999]


def test_greedy_ignores_top_p_top_k_and_min_p(sampler: Sampler) -> None:
    logits = _logits(1)
    params = _params(temperature=0.0, top_p=0.1, top_k=3, min_p=0.9)
    assert _tokens(sampler.sample(logits, [0], [_spec(params)])) == logits.argmax(-1).tolist()


def test_top_k_of_one_is_greedy_even_among_equals(sampler: Sampler) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [40, 30, 20]] = 1
    specs = [_spec(_params(temperature=50.0, top_k=1), index=i) for i in range(20)]
    assert set(_tokens(sampler.sample(logits, [0] * 20, specs))) == {20}


def test_a_very_low_temperature_is_greedy(sampler: Sampler) -> None:
    logits = _logits(1)
    assert _tokens(sampler.sample(logits, [0], [_spec(_params(temperature=1e-60))])) == logits.argmax(-1).tolist()


# Random


MIXED = [
    _params(temperature=0.0),
    _params(temperature=0.7, seed=1),
    _params(temperature=1.3, seed=2, top_k=7),
    _params(temperature=1.0, seed=3, top_p=0.5),
    _params(temperature=2.0, seed=4, top_p=0.95, top_k=900, min_p=0.01),
    _params(temperature=1.0, seed=5, min_p=0.05),
    _params(temperature=1.0, seed=6, frequency_penalty=1.0, logprobs=2),
    _params(temperature=0.0, seed=7, allowed_token_ids=[5, 6]),
]


def test_a_token_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    logits = _logits(len(MIXED)).bfloat16()
    for step in range(5):
        specs = [_spec(params, request=i, output=range(step)) for i, params in enumerate(MIXED)]
        together = _tokens(sampler.sample(logits, range(len(MIXED)), specs))
        alone = [_tokens(sampler.sample(logits[i : i + 1], [0], [spec]))[0] for i, spec in enumerate(specs)]
        backwards = _tokens(sampler.sample(logits.flip(0), range(len(MIXED)), specs[::-1]))[::-1]
        assert together == alone == backwards


def test_seeds_sequences_and_positions_draw_their_own_numbers(sampler: Sampler) -> None:
    specs = [
        _spec(_params(seed=seed), request=seed, index=i, output=range(n)) for seed in (1, 2) for i in (0, 1) for n in (0, 1)
    ]
    assert len(set(_tokens(sampler.sample(torch.zeros(1, VOCAB_SIZE), [0] * 8, specs)))) == 8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"temperature": 0.5}, [0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
        ({"top_k": 2}, [0.4 / 0.7, 0, 0.3 / 0.7, 0]),
        ({"top_p": 0.65}, [0.4 / 0.7, 0, 0.3 / 0.7, 0]),
        ({"top_p": 0.75}, [0.4 / 0.9, 0, 0.3 / 0.9, 0.2 / 0.9]),
        ({"min_p": 0.6}, [0.4 / 0.7, 0, 0.3 / 0.7, 0]),
        # top_p counts within what min_p and top_k leave: 0.4 of 0.9 is 0.44.
        ({"min_p": 0.45, "top_p": 0.44}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0.4 / 0.7, 0, 0.3 / 0.7, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(sampler: Sampler, values: dict[str, Any], expected: list[float]) -> None:
    drawn = _frequencies(sampler, _small_row(0.4, 0.1, 0.3, 0.2), _params(**values))
    wanted = torch.zeros(VOCAB_SIZE)
    wanted[:4] = torch.tensor(expected)
    assert (drawn[wanted == 0] == 0).all()
    # Four standard deviations.
    assert ((drawn - wanted).abs() <= 4 * (wanted * (1 - wanted) / NUM_DRAWS).sqrt() + 1e-9).all()


@pytest.mark.parametrize("num_kept", [1, 10, 600, 999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(sampler: Sampler, num_kept: int) -> None:
    # 600 and 999 tokens are more than are sorted at first.
    row = torch.arange(VOCAB_SIZE, 0, -1).float().log()[torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))]
    ranked = row.softmax(-1).double().sort(descending=True)
    mass = ranked.values.cumsum(-1)
    params = _params(top_p=float(mass[num_kept - 1] - ranked.values[num_kept - 1] / 2))
    drawn = _frequencies(sampler, row, params)
    assert (drawn[ranked.indices[num_kept:]] == 0).all()
    assert (drawn[ranked.indices[:num_kept]] > 0).float().mean() > 0.8


def test_top_p_and_top_k_take_the_lowest_ids_of_equals(sampler: Sampler) -> None:
    uniform = torch.zeros(VOCAB_SIZE)
    for params in (_params(top_k=50), _params(top_p=0.0499)):
        drawn = _frequencies(sampler, uniform, params)
        assert (drawn[:50] > 0).all() and (drawn[50:] == 0).all()


def test_the_number_sorted_at_first_changes_nothing(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(6)
    params = [_params(seed=i, top_p=p, top_k=k) for i, (p, k) in enumerate([(0.3, -1), (0.9, -1), (0.99, 700), (1.0, 40)])]
    specs = [_spec(params[i % 4], request=i % 4, index=i) for i in range(60)]
    rows = [i % 6 for i in range(60)]
    expected = _tokens(sampler.sample(logits, rows, specs))
    monkeypatch.setattr(sampler_module, "NUM_SORTED", 4)
    assert _tokens(sampler.sample(logits, rows, specs)) == expected


def test_a_token_of_no_probability_is_never_drawn(sampler: Sampler) -> None:
    row = torch.full((VOCAB_SIZE,), -math.inf)
    row[[300, 612]] = 0.0
    assert _frequencies(sampler, row, _params()).nonzero()[:, 0].tolist() == [300, 612]


# Log probabilities


def test_logprobs_are_the_models_own_whatever_changes_the_choice(sampler: Sampler) -> None:
    logits = _logits(3).bfloat16()
    raw = logits.float().log_softmax(-1)
    params = [
        _params(temperature=0.3, top_k=5, logprobs=3),
        _params(temperature=0.0, repetition_penalty=2.0, logit_bias={7: 100.0}, logprobs=3),
        _params(temperature=0.0, allowed_token_ids=[4], logprobs=3),
    ]
    specs = [_spec(p, request=i, output=[5, 5, 9]) for i, p in enumerate(params)]
    for row, sample in enumerate(sampler.sample(logits, range(3), specs)):
        token = sample.token_ids[0]
        assert sample.logprobs == pytest.approx([raw[row, token].item()], abs=1e-5)
        assert sample.top_logprobs is not None
        (top,) = sample.top_logprobs
        assert list(top)[0] == token
        best = raw[row].topk(3)
        for best_id, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            assert top[best_id] == pytest.approx(value, abs=1e-5)
        assert len(top) == (3 if token in best.indices else 4)


def test_the_chosen_tokens_logprob_is_the_same_number_in_both_places(sampler: Sampler) -> None:
    (sample,) = sampler.sample(_logits(1), [0], [_spec(_params(temperature=0.0, logprobs=1))])
    assert sample.top_logprobs == [{sample.token_ids[0]: sample.logprobs[0]}]


def test_no_top_logprobs_unless_asked_for(sampler: Sampler) -> None:
    params = [_params(), _params(logprobs=0)]
    without, with_none = sampler.sample(_logits(2), [0, 1], [_spec(p, request=i) for i, p in enumerate(params)])
    assert without.top_logprobs is None
    assert with_none.top_logprobs == [{with_none.token_ids[0]: with_none.logprobs[0]}]


# Candidates


def test_candidates_come_best_first_with_scores_after_processors(sampler: Sampler) -> None:
    logits = _logits(2)
    params = _params(use_beam_search=True, best_of=2, temperature=0.0, logit_bias={3: 20.0}, logprobs=1)
    specs = [_spec(params, index=i, num_candidates=4) for i in range(2)]
    for row, sample in enumerate(sampler.sample(logits, [0, 1], specs)):
        biased = logits[row].clone()
        biased[3] += 20
        expected = biased.log_softmax(-1).topk(4)
        assert sample.token_ids == expected.indices.tolist()
        assert sample.scores == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert sample.logprobs == pytest.approx(logits[row].log_softmax(-1)[expected.indices].tolist(), abs=1e-5)
        assert sample.top_logprobs is not None
        assert [list(top)[0] for top in sample.top_logprobs] == sample.token_ids


def test_tokens_that_are_not_allowed_are_no_candidates(sampler: Sampler) -> None:
    params = _params(use_beam_search=True, best_of=2, temperature=0.0, allowed_token_ids=[8, 3, 5])
    (sample,) = sampler.sample(torch.zeros(1, VOCAB_SIZE), [0], [_spec(params, num_candidates=4)])
    assert sample.token_ids == [3, 5, 8]


# Several specs, bad rows, state


def test_sequences_about_to_fork_share_a_row(sampler: Sampler) -> None:
    logits = _logits(2)
    params = _params(temperature=1.5, n=3)
    shared = _tokens(sampler.sample(logits, [1, 1, 1], [_spec(params, index=i) for i in range(3)]))
    apart = _tokens(sampler.sample(logits[[1, 1, 1]], [0, 1, 2], [_spec(params, index=i) for i in range(3)]))
    assert shared == apart and len(set(shared)) > 1


def test_a_request_that_allows_nothing_is_refused(sampler: Sampler) -> None:
    params = _params(allowed_token_ids=[2], min_tokens=3)
    with pytest.raises(InvalidRequestError, match="allows no token after 1 tokens.*AllowedTokenIds, MinTokens"):
        sampler.sample(_logits(1), [0], [_spec(params, output=[9])])


def test_logits_that_are_not_numbers_are_an_error(sampler: Sampler) -> None:
    logits = _logits(2)
    logits[1, 5] = math.nan
    with pytest.raises(RequestFailedError, match="overflowed"):
        sampler.sample(logits, [0, 1], [_spec(_params(temperature=0.0))] * 2)


def test_processors_are_made_once_per_request_and_dropped_when_it_ends(sampler: Sampler) -> None:
    first, second = _params(temperature=0.0, allowed_token_ids=[4]), _params(temperature=0.0, allowed_token_ids=[6])
    logits = _logits(1)
    assert _tokens(sampler.sample(logits, [0], [_spec(first)])) == [4]
    # Not a thing that an engine does: it only shows which processors are in use.
    assert _tokens(sampler.sample(logits, [0], [_spec(second)])) == [4]
    sampler.forget([0])
    assert _tokens(sampler.sample(logits, [0], [_spec(second)])) == [6]


EVERYTHING = [
    _params(temperature=0.8),
    _params(temperature=0.8, top_p=0.5),
    _params(temperature=0.0),
    _params(temperature=1.3, logprobs=2),
    _params(temperature=1.5, top_k=40, min_p=0.01),
    _params(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
    _params(temperature=0.9, top_p=0.9, top_k=50, frequency_penalty=0.5, logprobs=3),
    _params(temperature=1.0, logit_bias={7: 5.0, 900: -100.0}, min_tokens=5, stop_token_ids=[7]),
    _params(temperature=1.0, allowed_token_ids=[4, 5, 6, 999]),
    _params(temperature=0.0, logprobs=0),
]


def test_a_provider_changes_no_token_whatever_is_asked_for_and_whatever_else_is_in_the_step(context: Any) -> None:
    fused, own = _with_provider(context), Sampler(context)
    for step in range(8):
        logits = _logits(len(EVERYTHING), seed=step).bfloat16()
        specs = [_spec(params, request=i, output=range(3, 3 + step)) for i, params in enumerate(EVERYTHING)]
        together = fused.sample(logits, range(len(specs)), specs)
        # A number at a border may choose the neighbour; with these seeds none is there.
        expected = own.sample(logits, range(len(specs)), specs)
        assert _tokens(together) == _tokens(expected)
        for ours, theirs in zip(together, expected, strict=True):
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
            assert (ours.top_logprobs is None) == (theirs.top_logprobs is None)
            for found, wanted in zip(ours.top_logprobs or [], theirs.top_logprobs or [], strict=True):
                assert list(found) == list(wanted)
                assert list(found.values()) == pytest.approx(list(wanted.values()), abs=1e-5)
        alone = [fused.sample(logits[i : i + 1], [0], [spec])[0] for i, spec in enumerate(specs)]
        backwards = fused.sample(logits.flip(0), range(len(specs)), specs[::-1])[::-1]
        assert together == alone == backwards


def test_beams_beside_other_sequences_are_served_apart(context: Any) -> None:
    logits = _logits(3)
    beams = _params(use_beam_search=True, best_of=2, temperature=0.0, logprobs=1)
    specs = [_spec(_params(top_p=0.5)), _spec(beams, request=1, num_candidates=4), _spec(_params(temperature=0.0), request=2)]
    fused = _with_provider(context)
    together = fused.sample(logits, range(3), specs)
    assert together == [fused.sample(logits[i : i + 1], [0], [spec])[0] for i, spec in enumerate(specs)]
    assert len(together[1].token_ids) == 4


def test_logits_are_left_as_they_are(sampler: Sampler) -> None:
    logits = _logits(len(EVERYTHING))
    before = logits.clone()
    sampler.sample(logits, range(len(EVERYTHING)), [_spec(params, request=i) for i, params in enumerate(EVERYTHING)])
    assert torch.equal(logits, before)
