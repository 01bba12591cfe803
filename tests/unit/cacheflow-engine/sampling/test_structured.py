"""The mask of structured output, on a vocabulary of single characters."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch

from cacheflow.errors import InvalidRequestError
from cacheflow.interfaces import ProcessorRow
from cacheflow.sampling import structured
from cacheflow.sampling.structured import Structured
from cacheflow.types import SamplingParams, StructuredOutput

EOS, OTHER_EOS, SPECIAL = 128, 129, 130


class Characters:
    """A `ProcessorContext`: ASCII, three special tokens, and ids that stand for nothing."""

    vocab_size = 137
    eos_token_ids: tuple[int, ...] = (EOS, OTHER_EOS)

    def special_token_ids(self) -> frozenset[int]:
        return frozenset((EOS, OTHER_EOS, SPECIAL))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(128)] + [b"</s>", b"<end>", b"a"] + [b""] * 6


CONTEXT = Characters()


def processor(context: Characters = CONTEXT, **params: Any) -> Structured:
    found = Structured.from_params(SamplingParams(**params), context)
    assert found is not None
    return found


def allowed(own: Structured, text: str = "", *more_ids: int, sequence_id: int = 1) -> set[str | int]:
    logits = torch.zeros(1, CONTEXT.vocab_size)
    output = [*text.encode(), *more_ids]
    row = ProcessorRow(row=0, processor=own, sequence_id=sequence_id, prompt_token_ids=[1], output_token_ids=output)
    Structured.apply(logits, [row])
    return {chr(i) if i < 128 else i for i in (logits[0] > -math.inf).nonzero()[:, 0].tolist()}


def test_only_what_the_grammar_has_next_is_allowed() -> None:
    own = processor(structured=StructuredOutput(choices=("red", "rose", "blue")))
    assert allowed(own) == {"r", "b"}
    assert allowed(own, "r") == {"e", "o"}
    assert allowed(own, "re") == {"d"}


def test_ends_are_allowed_exactly_when_the_text_is_complete() -> None:
    own = processor(structured=StructuredOutput(regex="a|abc"), stop_token_ids=[ord("z")])
    assert allowed(own) == {"a"}
    assert allowed(own, "a") == {"b", EOS, OTHER_EOS, "z"}
    assert allowed(own, "ab") == {"c"}
    assert allowed(own, "abc") == {EOS, OTHER_EOS, "z"}


def test_a_stop_token_that_is_text_is_no_text_of_the_grammar() -> None:
    own = processor(structured=StructuredOutput(regex="[yz]{2}"), stop_token_ids=[ord("z")])
    assert allowed(own, "y") == {"y"}
    assert allowed(own, "yy") == {EOS, OTHER_EOS, "z"}


def test_special_tokens_and_ids_without_text_are_never_text() -> None:
    own = processor(structured=StructuredOutput(regex="a+"))
    assert allowed(own) == {"a"}


def test_what_comes_behind_the_end_is_an_end() -> None:
    own = processor(structured=StructuredOutput(regex="ab?"), ignore_eos=True)
    assert allowed(own, "a", EOS) == {EOS, OTHER_EOS}
    assert allowed(own, "a", EOS, EOS, sequence_id=2) == {EOS, OTHER_EOS}


def test_a_complete_text_ends_before_min_tokens() -> None:
    own = processor(structured=StructuredOutput(regex="ab"), min_tokens=5)
    logits = torch.zeros(1, CONTEXT.vocab_size)
    logits[0, [EOS, OTHER_EOS]] = -math.inf
    row = ProcessorRow(row=0, processor=own, sequence_id=1, prompt_token_ids=[1], output_token_ids=list(b"ab"))
    Structured.apply(logits, [row])
    assert (logits[0] > -math.inf).nonzero()[:, 0].tolist() == [EOS, OTHER_EOS]


def test_state_follows_a_sequence_that_was_rolled_back_or_replaced() -> None:
    own = processor(structured=StructuredOutput(regex="ab|cd"))
    assert allowed(own, "a") == {"b"}
    assert allowed(own, "c") == {"d"}
    assert allowed(own) == {"a", "c"}
    assert allowed(own, "ab", sequence_id=9) == {EOS, OTHER_EOS}


def test_the_state_kept_for_a_request_is_bounded() -> None:
    own = processor(structured=StructuredOutput(regex="a*"), n=3)
    for sequence_id in range(50):
        allowed(own, "aa", sequence_id=sequence_id)
    assert len(own._sequences) == 6


def test_rows_without_structure_are_left_alone() -> None:
    logits = torch.randn(3, CONTEXT.vocab_size)
    before = logits.clone()
    own = processor(structured=StructuredOutput(regex="a"))
    row = ProcessorRow(row=1, processor=own, sequence_id=1, prompt_token_ids=[1], output_token_ids=[])
    Structured.apply(logits, [row])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert logits[1, ord("a")] == before[1, ord("a")]


def test_the_vocabulary_is_read_once_per_tokenizer() -> None:
    class Counting(Characters):
        num_reads = 0

        def token_bytes(self) -> list[bytes]:
            self.num_reads += 1
            return super().token_bytes()

    context = Counting()
    for regex in ("a", "b", "c"):
        processor(context, structured=StructuredOutput(regex=regex))
    assert context.num_reads == 1


def test_a_grammar_is_compiled_once_and_the_ones_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "MAX_COMPILED", 3)
    context = Characters()
    first = processor(context, structured=StructuredOutput(regex="a"))
    assert processor(context, structured=StructuredOutput(regex="a"))._start is first._start
    for i in range(10):
        processor(context, structured=StructuredOutput(regex=f"a{i}"))
    assert len(structured._grammars_of(context)._compiled) == 3


def test_json_is_any_object_and_nothing_else() -> None:
    own = processor(structured=StructuredOutput(json_object=True))
    assert allowed(own) == {"{"}
    assert EOS not in allowed(own, '{"a": [1, 2')
    assert {EOS, OTHER_EOS} <= allowed(own, '{"a": [1, 2]}')


def test_a_model_without_an_end_of_text_is_refused() -> None:
    class Endless(Characters):
        eos_token_ids = ()

    with pytest.raises(InvalidRequestError, match="end-of-text"):
        processor(Endless(), structured=StructuredOutput(regex="a"))


@pytest.mark.parametrize("regex", ["(a?){300}a{300}", "(.*a.{300})", "((a{1,99}){1,99}){1,99}"])
def test_a_costly_pattern_is_masked_or_refused(regex: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        own = processor(structured=StructuredOutput(regex=regex))
        for length in (0, 1, 40, 300):
            assert allowed(own, "a" * length)


def test_a_pattern_that_turns_out_too_large_is_refused_without_the_librarys_insides() -> None:
    own = processor(structured=StructuredOutput(regex="((a{1000}){1000}){1000}"))
    with pytest.raises(InvalidRequestError, match="^regex can't be used: lexer error: too many") as found:
        [allowed(own, "a" * length) for length in range(3)]
    assert "<state>" not in str(found.value)
    assert len(str(found.value)) < 200
