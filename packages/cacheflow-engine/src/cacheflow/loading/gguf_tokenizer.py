"""Turns the tokenizer in a GGUF file's metadata into `TokenizerData`.

Two kinds exist there: byte-level BPE ("gpt2"), whose way of splitting text is named, and SentencePiece-like BPE ("llama"),
which has scores in place of merges. It knows the metadata's keys and the `tokenizers` library, no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from cacheflow.errors import CheckpointError
from cacheflow.types import TokenizerData

logger = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4
"""Kinds of tokens that are recognised as a whole in a text; control tokens are special."""
_SPECIAL_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_END_NAMES = ("eos", "eot", "eom")

_WORDS_OF_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_OF_QWEN2 = _WORDS_OF_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PLAIN_WORDS = ("gpt-2", "gpt2", "default", "")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_PATTERNS = {"llama-bpe": _WORDS_OF_LLAMA3, "llama3": _WORDS_OF_LLAMA3, "llama-v3": _WORDS_OF_LLAMA3, "qwen2": _WORDS_OF_QWEN2}


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> TokenizerData:
    """The tokenizer, chat template and the ids that end a text.

    Raises:
        CheckpointError: There is none, it is damaged, or its kind is not implemented.
    """
    entries = {key.removeprefix(_KEY): value for key, value in metadata.items() if key.startswith(_KEY)}
    tokens, kind = entries.get("tokens"), entries.get("model")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        _fail("it has no list of tokens")
    if kind not in ("gpt2", "llama"):
        _fail(f"its kind is {kind!r}; 'gpt2' and 'llama' are implemented")
    try:
        tokenizer = _byte_level(tokens, entries) if kind == "gpt2" else _sentence_pieces(tokens, entries)
        _add_whole_tokens(tokenizer, tokens, entries)
    except CheckpointError:
        raise
    except Exception as error:  # The library raises nothing more particular for merges that don't fit the tokens.
        _fail(f"its parts don't fit together ({error})")
    ids = {name: entries.get(f"{name}_token_id") for name in (*_SPECIAL_NAMES, *_END_NAMES)}
    known = {name: token_id for name, token_id in ids.items() if isinstance(token_id, int) and 0 <= token_id < len(tokens)}
    template = metadata.get("tokenizer.chat_template")
    return TokenizerData(
        tokenizer_json=tokenizer.to_str(),
        chat_template=template if isinstance(template, str) else None,
        special_tokens={_SPECIAL_NAMES[name]: tokens[known[name]] for name in _SPECIAL_NAMES if name in known},
        bos_token_id=known.get("bos"),
        eos_token_ids=list(dict.fromkeys(known[name] for name in _END_NAMES if name in known)),
        add_bos="bos" in known and bool(entries.get("add_bos_token", kind == "llama" or entries.get("pre") == "llama-bpe")),
    )


def _byte_level(tokens: list[str], entries: Mapping[str, Any]) -> Tokenizer:
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _texts(entries, "merges"))]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    words = str(entries.get("pre", ""))
    # Llama 3's own tokenizer takes a word that is a token as it is, without building it up from merges.
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=_PATTERNS.get(words) is _WORDS_OF_LLAMA3))
    if words in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[words]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    elif words in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif words in _PLAIN_WORDS:
        if words not in ("gpt-2", "gpt2"):
            logger.warning("the GGUF file does not say how its tokenizer splits words; taking GPT-2's way")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        known = ", ".join(sorted((*_PATTERNS, *_SINGLE_DIGITS, "gpt-2")))
        _fail(f"its way of splitting words is {words!r}; implemented are {known}")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(tokens: list[str], entries: Mapping[str, Any]) -> Tokenizer:
    """A token's score says how early it is merged; its merges are all the ways to build it from two other tokens."""
    scores = entries.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        _fail(f"it has no score for each of its {len(tokens)} tokens")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [(left, right) for left, right in halves if left in vocab and right in vocab]
        found.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, pair) for pair in found]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    unknown = entries.get("unknown_token_id", 0)
    unknown_token = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    model = BPE(vocab=vocab, merges=[pair for _, pair in merges], unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    starts_with_space = entries.get("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if starts_with_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if starts_with_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], entries: Mapping[str, Any]) -> None:
    kinds = entries.get("token_type")
    kinds = kinds if isinstance(kinds, list) else []
    whole = [pair for pair in zip(tokens, kinds, strict=False) if pair[1] in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in whole])


def _texts(entries: Mapping[str, Any], name: str) -> list[str]:
    values = entries.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        _fail(f"it has no list of {name}")
    return values


def _fail(reason: str) -> NoReturn:
    raise CheckpointError(f"The GGUF file's tokenizer can't be used: {reason}. Name another tokenizer with --tokenizer.")
