from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import tokenizers
from tiny_tokenizers import ALL, BOS, EOS, byte_fallback_bpe, byte_fallback_unigram, byte_level_bpe, word_pieces

from cacheflow.errors import CheckpointError, InvalidRequestError
from cacheflow.text import Tokenizer
from cacheflow.types import TokenizerData

TEXT = "hello world, hello é 你好 😀  abc"


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
def test_encoding_then_decoding_gives_the_text_back(make):
    tokenizer = Tokenizer(make())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("make", ALL)
def test_single_ids_decode_as_the_library_decodes_them(make):
    data = make()
    tokenizer, library = Tokenizer(data), tokenizers.Tokenizer.from_str(data.tokenizer_json)
    for token_id in range(tokenizer.vocab_size):
        for skip in (True, False):
            assert tokenizer.decode([token_id], skip) == library.decode([token_id], skip_special_tokens=skip)


def test_bos_is_prepended_when_the_model_wants_it():
    tokenizer = Tokenizer(byte_fallback_bpe())
    assert tokenizer.encode("hello")[0] == BOS
    assert tokenizer.encode("hello", add_bos=False) == tokenizer.encode("hello")[1:]
    assert Tokenizer(byte_level_bpe()).encode("hello", add_bos=True)[0] == BOS
    assert BOS not in Tokenizer(byte_level_bpe()).encode("hello")


def test_a_text_that_begins_with_bos_gets_no_second_one():
    assert Tokenizer(byte_fallback_bpe()).encode("<s>hello").count(BOS) == 1


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, byte_fallback_unigram])
@pytest.mark.parametrize("text", [TEXT, "hello world, " * 50, " " * 99, "▁" * 99, "😀" * 20, "</s>" * 20, "\0\n" * 50])
def test_no_text_has_fewer_tokens_than_its_bytes_need(make, text):
    tokenizer = Tokenizer(make())
    assert 0 < tokenizer.min_tokens(text) <= len(tokenizer.encode(text))


def test_bytes_that_no_token_stands_for_need_none():
    data = byte_level_bpe()
    document = json.loads(data.tokenizer_json)
    del document["model"]["vocab"]["z"]
    tokenizer = Tokenizer(replace(data, tokenizer_json=json.dumps(document)))
    assert tokenizer.encode("z" * 1000) == []
    assert tokenizer.min_tokens("z" * 1000) == 0
    assert tokenizer.min_tokens("a" * 1000) > 0


def test_nothing_is_known_of_a_tokenizer_that_fuses_unknown_words():
    tokenizer = Tokenizer(word_pieces())
    assert len(tokenizer.encode("\u4e00" * 500)) < 500
    assert tokenizer.min_tokens("\u4e00" * 500) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
    ],
)
def test_nothing_is_known_of_a_tokenizer_that_drops_parts_of_a_text(change):
    data = byte_level_bpe()
    document = json.loads(data.tokenizer_json)
    assert Tokenizer(data).min_tokens("a" * 1000) > 0
    assert Tokenizer(replace(data, tokenizer_json=json.dumps(document | change))).min_tokens("a" * 1000) == 0


def test_other_threads_go_on_while_a_long_text_is_tokenised():
    tokenizer = Tokenizer(byte_level_bpe())
    thread = threading.Thread(target=tokenizer.encode, args=("hello world " * 100_000,))
    num_turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    # Were the interpreter held meanwhile, there would be one or two.
    assert num_turns > 5


def test_an_empty_text_is_bos_or_nothing():
    assert Tokenizer(byte_fallback_bpe()).encode("") == [BOS]
    assert Tokenizer(byte_level_bpe()).encode("") == []


def test_special_tokens_in_a_text_are_recognised():
    tokenizer = Tokenizer(byte_level_bpe())
    ids = tokenizer.encode("hello</s>")
    assert ids[-1] == EOS
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello</s>"


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored():
    library = tokenizers.Tokenizer.from_str(byte_level_bpe().tokenizer_json)
    library.enable_truncation(2)
    library.enable_padding(length=64)
    tokenizer = Tokenizer(TokenizerData(tokenizer_json=library.to_str()))
    assert tokenizer.encode(TEXT) == Tokenizer(byte_level_bpe()).encode(TEXT)


def test_a_token_text_is_what_the_token_adds_inside_a_text():
    tokenizer = Tokenizer(byte_level_bpe())
    assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("hello wo")] == ["hello", " wo"]
    tokenizer = Tokenizer(byte_fallback_bpe())
    assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("h", add_bos=True)] == ["<s>", " h"]
    tokenizer = Tokenizer(word_pieces())
    assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("hello worlds")] == [" hello", " world", "s"]


def test_token_bytes_make_up_the_bytes_of_a_text():
    text = "hello é 😀"
    tokenizer = Tokenizer(byte_level_bpe())
    pieces = tokenizer.token_bytes()
    assert len(pieces) == tokenizer.vocab_size
    assert b"".join(pieces[token_id] for token_id in tokenizer.encode(text)) == text.encode()
    tokenizer = Tokenizer(byte_fallback_bpe())
    pieces = tokenizer.token_bytes()
    assert b"".join(pieces[token_id] for token_id in tokenizer.encode(text, add_bos=False)) == f" {text}".encode()


def test_ids_between_tokenizer_and_model_vocabulary_stand_for_no_text():
    data = byte_level_bpe()
    num_tokens = Tokenizer(data).vocab_size
    tokenizer = Tokenizer(data, model_vocab_size=num_tokens + 8)
    assert tokenizer.vocab_size == num_tokens + 8
    assert tokenizer.decode([num_tokens + 7]) == tokenizer.token_text(num_tokens + 7) == ""
    assert tokenizer.token_bytes()[num_tokens:] == [b""] * 8


@pytest.mark.parametrize("token_id", [-1, 276, 2**70])
def test_an_id_out_of_range_is_named_together_with_the_range(token_id):
    tokenizer = Tokenizer(byte_level_bpe())
    for act in (tokenizer.token_text, lambda token_id: tokenizer.decode([5, token_id])):
        with pytest.raises(InvalidRequestError, match=f"{token_id} is out of range.* 0 to 275"):
            act(token_id)


def test_only_tokens_marked_as_special_are_special():
    tokenizer = Tokenizer(byte_level_bpe())
    assert sorted(tokenizer.special_ids) == [0, 1, 2, 3]


def test_half_a_surrogate_pair_is_an_invalid_request():
    with pytest.raises(InvalidRequestError, match="surrogate"):
        Tokenizer(byte_level_bpe()).encode("a\ud83d")


def test_a_damaged_tokenizer_is_refused_with_a_reason():
    with pytest.raises(CheckpointError, match="--tokenizer"):
        Tokenizer(TokenizerData(tokenizer_json='{"model": '))


def test_text_imports_neither_torch_nor_transformers():
    code = "import cacheflow.text, sys; print([m for m in ('torch', 'transformers', 'msgspec', 'zmq') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
