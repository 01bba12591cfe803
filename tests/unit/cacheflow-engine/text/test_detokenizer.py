from __future__ import annotations

import pytest
from tiny_tokenizers import BOS, EOS, byte_fallback_bpe, byte_fallback_unigram, byte_level_bpe

from cacheflow.text import Tokenizer


def deltas(tokenizer, ids, **options):
    detokenizer = tokenizer.detokenizer(**options)
    return [detokenizer.add(token_id) for token_id in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
def test_a_character_comes_out_with_its_last_byte(make):
    tokenizer = Tokenizer(make())
    ids = tokenizer.encode("😀", add_bos=False)
    given = deltas(tokenizer, ids, context=tokenizer.encode("a"))
    assert [text for text in given if text.strip()] == ["😀"]
    assert given[len(ids) - 1] == "😀"


def test_an_incomplete_character_at_the_end_is_flushed_as_a_replacement():
    tokenizer = Tokenizer(byte_level_bpe())
    ids = tokenizer.encode("a😀")[:-1]
    assert deltas(tokenizer, ids)[-1] == "�"
    assert "".join(deltas(tokenizer, ids)) == "a�"


def test_bytes_that_never_become_a_character_do_not_hold_up_what_follows():
    tokenizer = Tokenizer(byte_level_bpe())
    lead_byte = tokenizer.encode("😀")[0]
    given = deltas(tokenizer, [lead_byte, *tokenizer.encode("hello"), lead_byte, lead_byte])
    assert given == ["", "�hello", "", "�", "�"]


def test_a_skipped_special_token_does_not_break_a_character():
    tokenizer = Tokenizer(byte_level_bpe())
    ids = tokenizer.encode("😀")
    assert "".join(deltas(tokenizer, [*ids[:1], EOS, *ids[1:]])) == "😀"
    assert "".join(deltas(tokenizer, [*ids[:1], EOS, *ids[1:]], skip_special_tokens=False)).startswith("�</s>�")


def test_ids_that_no_token_has_stand_for_nothing():
    tokenizer = Tokenizer(byte_level_bpe())
    assert "".join(deltas(tokenizer, [100_000, *tokenizer.encode("hello"), 100_001])) == "hello"


def test_whole_characters_of_an_invalid_run_of_byte_tokens_are_kept():
    tokenizer = Tokenizer(byte_fallback_bpe())
    run = tokenizer.encode("你好", add_bos=False)[1:]
    assert tokenizer.decode(run[:-1]) == "你�"


@pytest.mark.parametrize("make", [byte_fallback_bpe, byte_fallback_unigram])
def test_the_first_word_keeps_its_space_behind_a_prompt_and_drops_it_at_the_start(make):
    tokenizer = Tokenizer(make())
    ids = tokenizer.encode("hello world", add_bos=False)
    prompt = tokenizer.encode("abc")
    assert "".join(deltas(tokenizer, ids)) == "hello world"
    assert "".join(deltas(tokenizer, ids, context=[BOS])) == "hello world"
    assert "".join(deltas(tokenizer, ids, context=prompt)) == " hello world"
    assert "abc" + "".join(deltas(tokenizer, ids, context=prompt)) == tokenizer.decode(prompt + ids)
