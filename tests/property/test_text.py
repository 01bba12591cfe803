"""The invariants of text: for any tokens, any stop strings and any way of cutting them into updates."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import ALL, byte_fallback_bpe, byte_level_bpe

from cacheflow.text import RequestAssembler, Tokenizer
from cacheflow.types import EngineRequest, RequestUpdate, SamplingParams, SequenceUpdate

TOKENIZERS = {make.__name__: Tokenizer(make()) for make in ALL}
PROMPT = {name: tokenizer.encode("hello") for name, tokenizer in TOKENIZERS.items()}
names = st.sampled_from(sorted(TOKENIZERS))
any_ids = st.lists(st.integers(0, min(t.vocab_size for t in TOKENIZERS.values()) - 1) | st.integers(0, 300), max_size=24)
# Few letters, so that stop strings occur, overlap and almost occur.
texts = st.text("abc 你é😀h", max_size=24)
stop_lists = st.lists(st.text("abc 你é😀h�", min_size=1, max_size=5), max_size=4).map(tuple)


def logprob(position):
    return -(position + 1) / 8


def updates(ids, cuts, *, finish_reason="length"):
    """One update for each stretch between the cuts; the last one ends the sequence."""
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)}) if ids else [0, 0]
    for start, end in pairwise(edges):
        is_last = end == len(ids)
        yield RequestUpdate(
            request_id="r",
            sequences=[
                SequenceUpdate(
                    index=0,
                    new_token_ids=ids[start:end],
                    new_logprobs=[{ids[p]: logprob(p)} for p in range(start, end)],
                    cumulative_logprob=sum(map(logprob, range(end))),
                    finish_reason=finish_reason if is_last else None,
                )
            ],
            finished=is_last,
        )


def run(name, ids, cuts, **params):
    """All outputs of one sequence, up to the finished one."""
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=PROMPT[name],
        params=SamplingParams(max_tokens=None, logprobs=0, **params),
        arrival_s=0.0,
    )
    assembler = RequestAssembler(TOKENIZERS[name], request, None)
    outputs = []
    for update in updates(ids, cuts):
        output = assembler.apply(update)
        outputs.append(output.outputs[0])
        assert output.finished == output.outputs[0].finished
        if output.finished:
            break
    return outputs


def first_stop(text, stops, begin=0):
    """The specification: (start, end, stop string) of the occurrence that is complete first, of those the longest."""
    for end in range(begin + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text.endswith(stop, begin, end):
                return end - len(stop), end, stop
    return None


@given(names, any_ids, st.booleans())
def test_concatenated_deltas_equal_the_full_decode_for_any_ids(name, ids, skip):
    tokenizer = TOKENIZERS[name]
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    detokenizer = tokenizer.detokenizer(skip)
    deltas = [detokenizer.add(token_id) for token_id in ids] + [detokenizer.flush()]
    assert "".join(deltas) == tokenizer.decode(ids, skip)


@given(names, any_ids, st.booleans())
def test_decoding_is_the_library_s_wherever_that_gives_valid_text(name, ids, skip):
    tokenizer = TOKENIZERS[name]
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    library = tokenizers.Tokenizer.from_str(tokenizer.data.tokenizer_json)
    expected = library.decode(ids, skip_special_tokens=skip)
    if name == "byte_level_bpe" or "�" not in expected:
        assert tokenizer.decode(ids, skip) == expected


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
@given(ids=any_ids)
def test_decoding_is_the_bytes_of_the_tokens_read_as_utf_8(make, ids):
    tokenizer = TOKENIZERS[make.__name__]
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    pieces = tokenizer.token_bytes()
    text = b"".join(pieces[token_id] for token_id in ids).decode("utf-8", "replace")
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False, context=tokenizer.encode("abc"))
    assert "".join(map(detokenizer.add, ids)) + detokenizer.flush() == text


@given(names, any_ids, st.lists(st.integers(0, 24)), stop_lists)
def test_text_tokens_and_log_probabilities_of_every_output_agree(name, ids, cuts, stops):
    tokenizer = TOKENIZERS[name]
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    for output in run(name, ids, cuts, stop=stops):
        count = len(output.token_ids)
        assert output.token_ids == ids[:count]
        assert output.logprobs == [{ids[p]: logprob(p)} for p in range(count)]
        assert output.cumulative_logprob == pytest.approx(sum(map(logprob, range(count))), abs=1e-9)
        decoded = tokenizer.decode([*PROMPT[name], *output.token_ids])[len(tokenizer.decode(PROMPT[name])) :]
        if output.finish_reason == "stop":
            assert decoded.startswith(output.text)
        else:
            assert decoded == output.text


@given(names, any_ids, st.lists(st.integers(0, 24)), stop_lists)
def test_outputs_only_ever_grow(name, ids, cuts, stops):
    ids = [token_id % TOKENIZERS[name].vocab_size for token_id in ids]
    outputs = run(name, ids, cuts, stop=stops)
    for earlier, later in pairwise(outputs):
        assert later.text.startswith(earlier.text)
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids


@given(names, any_ids, st.lists(st.integers(0, 24)), stop_lists, st.booleans(), st.integers(0, 6))
def test_streamed_output_equals_the_one_computed_in_one_go(name, ids, cuts, stops, include, min_tokens):
    ids = [token_id % TOKENIZERS[name].vocab_size for token_id in ids]
    params = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    streamed, whole = run(name, ids, cuts, **params)[-1], run(name, ids, [], **params)[-1]
    assert (streamed.text, streamed.token_ids, streamed.finish_reason) == (whole.text, whole.token_ids, whole.finish_reason)
    assert streamed.stop_reason == whole.stop_reason


@given(texts, st.lists(st.integers(0, 24)), stop_lists, st.booleans())
def test_the_cut_is_at_the_first_stop_string(text, cuts, stops, include):
    name = "byte_level_bpe"
    output = run(name, TOKENIZERS[name].encode(text), cuts, stop=stops, include_stop_str_in_output=include)[-1]
    found = first_stop(text, stops)
    if found is None:
        assert (output.text, output.finish_reason, output.stop_reason) == (text, "length", None)
    else:
        start, end, stop = found
        assert (output.text, output.finish_reason, output.stop_reason) == (text[: end if include else start], "stop", stop)


@given(texts, stop_lists, st.integers(0, 8))
def test_the_first_min_tokens_are_exempt_from_stop_strings(text, stops, min_tokens):
    name = "byte_level_bpe"
    ids = TOKENIZERS[name].encode(text)
    output = run(name, ids, range(len(ids)), stop=stops, min_tokens=min_tokens)[-1]
    # The characters begun in the first tokens: an incomplete one shows as one replacement character.
    found = first_stop(text, stops, begin=len(TOKENIZERS[name].decode(ids[:min_tokens])))
    if len(ids) <= min_tokens or found is None:
        assert output.text == text
    else:
        assert (output.text, output.stop_reason) == (text[: found[0]], found[2])


@given(texts, stop_lists.filter(bool), st.integers(0, 3), st.lists(st.integers(0, 24)), texts)
def test_a_stop_string_never_leaks_not_even_in_part(before, stops, chosen, cuts, behind):
    name = "byte_level_bpe"
    text = before + stops[chosen % len(stops)] + behind
    found = first_stop(text, stops)
    assert found is not None
    for output in run(name, TOKENIZERS[name].encode(text), cuts, stop=stops):
        assert text[: found[0]].startswith(output.text)


@given(texts, st.sampled_from(["byte_level_bpe", "byte_fallback_bpe"]))
def test_characters_are_never_broken(text, name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_bos=False)
    for output in run(name, ids, range(len(ids))):
        assert "�" not in output.text
