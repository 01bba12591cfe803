"""What each processor does to the logits of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cacheflow.errors import InvalidRequestError
from cacheflow.interfaces import ProcessorRow
from cacheflow.sampling.processors import AllowedTokenIds, BadWords, LogitBias, MinTokens, Penalties
from cacheflow.types import SamplingParams

VOCAB_SIZE = 1000


def _apply(
    processor: Any, params: SamplingParams, context: Any, output: Sequence[int], prompt: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row before and after; the rows around it must not change."""
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    instance = processor.from_params(params, context)
    row = ProcessorRow(row=1, processor=instance, sequence_id=0, prompt_token_ids=list(prompt), output_token_ids=list(output))
    processor.apply(logits, [row])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    return before[1], logits[1]


def _changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("processor", [AllowedTokenIds, BadWords, LogitBias, MinTokens, Penalties])
def test_a_request_that_asks_for_nothing_has_no_processor(processor: Any, context: Any) -> None:
    assert processor.from_params(SamplingParams(), context) is None


def test_min_tokens_hides_every_token_that_would_end_the_sequence(context: Any) -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=[40, 50])
    for length in range(3):
        before, after = _apply(MinTokens, params, context, range(length))
        assert _changed(before, after) == [2, 40, 50]
        assert (after[[2, 40, 50]] == -math.inf).all()
    assert not _changed(*_apply(MinTokens, params, context, range(3)))


def test_min_tokens_leaves_an_end_of_text_that_is_ignored(context: Any) -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=[40], ignore_eos=True)
    assert _changed(*_apply(MinTokens, params, context, [])) == [40]
    assert MinTokens.from_params(SamplingParams(min_tokens=3, ignore_eos=True), context) is None


def test_presence_and_frequency_penalties_count_output_tokens_only(context: Any) -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    before, after = _apply(Penalties, params, context, output=[7, 9, 7, 7], prompt=[7, 8])
    assert _changed(before, after) == [7, 9]
    assert after[7].item() == pytest.approx(before[7].item() - 0.5 - 3 * 0.25)
    assert after[9].item() == pytest.approx(before[9].item() - 0.5 - 0.25)


def test_repetition_penalty_shrinks_positive_and_grows_negative_logits_of_prompt_and_output(context: Any) -> None:
    before, after = _apply(Penalties, SamplingParams(repetition_penalty=2.0), context, output=[1, 2, 2, 3], prompt=[3, 4, 5])
    assert _changed(before, after) == [1, 2, 3, 4, 5]
    for token in range(1, 6):
        value = before[token].item()
        assert after[token].item() == pytest.approx(value / 2 if value > 0 else value * 2)


def test_all_penalties_together_repeat_first_and_then_subtract(context: Any) -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=0.5)
    before, after = _apply(Penalties, params, context, output=[6, 6], prompt=[])
    value = before[6].item()
    assert after[6].item() == pytest.approx((value / 0.5 if value > 0 else value * 0.5) - 1 - 2)


def test_logit_bias_is_added(context: Any) -> None:
    before, after = _apply(LogitBias, SamplingParams(logit_bias={5: 2.5, 900: -100}), context, [])
    assert _changed(before, after) == [5, 900]
    assert (after - before)[[5, 900]].tolist() == pytest.approx([2.5, -100], abs=1e-5)


def test_only_allowed_token_ids_keep_their_logits(context: Any) -> None:
    before, after = _apply(AllowedTokenIds, SamplingParams(allowed_token_ids=[5, 900, 5]), context, [])
    assert (after > -math.inf).nonzero()[:, 0].tolist() == [5, 900]
    assert torch.equal(after[[5, 900]], before[[5, 900]])


@pytest.mark.parametrize(
    ("processor", "params"),
    [(LogitBias, SamplingParams(logit_bias={1000: 1.0})), (AllowedTokenIds, SamplingParams(allowed_token_ids=[1, 1000]))],
)
def test_ids_outside_the_vocabulary_are_refused(processor: Any, params: SamplingParams, context: Any) -> None:
    with pytest.raises(InvalidRequestError, match="token id 1000; the model has ids 0 to 999"):
        processor.from_params(params, context)


@pytest.mark.parametrize(
    ("output", "banned"),
    [
        ("", "x"),
        ("so ba", "xd"),
        ("so b", "x"),
        ("a", "x"),
        ("ba", "xd"),
        ("xab", "xc"),
        ("bab", "xc"),
        ("ab bd", "x"),
    ],
)
def test_bad_words_ban_the_token_that_would_complete_one(output: str, banned: str, context: Any) -> None:
    params = SamplingParams(bad_words=["x", "bad", "abc"])
    before, after = _apply(BadWords, params, context, context.encode(output))
    assert _changed(before, after) == sorted(ord(c) for c in banned)
    assert (after[[ord(c) for c in banned]] == -math.inf).all()


def test_a_bad_word_with_a_space_before_it_is_banned_where_that_is_another_token(context: Any) -> None:
    class OneTokenPerWord(type(context)):  # type: ignore[misc]
        def encode(self, text: str) -> list[int]:
            return [{"bad": 70, " bad": 71}[text]]

    before, after = _apply(BadWords, SamplingParams(bad_words=["bad"]), OneTokenPerWord(), [])
    assert _changed(before, after) == [70, 71]


def test_the_beginning_of_a_bad_word_in_the_prompt_does_not_count(context: Any) -> None:
    before, after = _apply(BadWords, SamplingParams(bad_words=["bad"]), context, output=[], prompt=context.encode("ba"))
    assert not _changed(before, after)
