"""Small tokenizers of the kinds that language models have, built in memory."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cacheflow.types import TokenizerData

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>")
BOS, EOS = 1, 2


def _data(tokenizer: Tokenizer, *, add_bos: bool) -> TokenizerData:
    return TokenizerData(tokenizer_json=tokenizer.to_str(), bos_token_id=BOS, eos_token_ids=[EOS], add_bos=add_bos)


def byte_level_bpe() -> TokenizerData:
    """Like GPT-2, OPT, Llama 3, SmolLM2: every byte has a token; merges make words, whole characters and parts of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("Ġ", "Ġ"), ("a", "b"), ("ab", "c")]
    # "é"; the first three bytes of most emoji; the last byte of one character and the first of the next.
    merges += [("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("ł", "å"), ("b", "ä")]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken("你好", normalized=False), AddedToken("<tool>", normalized=False)])
    return _data(tokenizer, add_bos=False)


def _sentencepiece_tokens() -> list[str]:
    words = ["▁", "▁▁", "▁h", "▁hello", "▁world", "a", "b", "c", "ab", "abc", "▁ab", "h", "e", "l", "o", "lo", "é", "▁é", "."]
    return [*SPECIAL_TOKENS[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *words, SPECIAL_TOKENS[3]]


def byte_fallback_bpe() -> TokenizerData:
    """Like Llama 2 and Mistral: words with their space, and a token per byte for all that has none."""
    tokens = _sentencepiece_tokens()
    merges = [("▁", "▁"), ("▁", "h"), ("l", "o"), ("a", "b"), ("ab", "c"), ("▁", "ab"), ("▁", "é")]
    vocab = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return _data(tokenizer, add_bos=True)


def byte_fallback_unigram() -> TokenizerData:
    """A SentencePiece unigram model whose Metaspace decoder drops the first space."""
    tokens = [(token, -float(number % 7)) for number, token in enumerate(_sentencepiece_tokens())]
    tokenizer = Tokenizer(models.Unigram(tokens, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return _data(tokenizer, add_bos=True)


def word_pieces() -> TokenizerData:
    """Neither bytes nor SentencePiece: words are joined by spaces, parts of words by nothing."""
    tokens = [*SPECIAL_TOKENS, "hello", "world", "##s", "##ly", "é", ".", "你"]
    tokenizer = Tokenizer(models.WordPiece(vocab={token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return _data(tokenizer, add_bos=False)


ALL = (byte_level_bpe, byte_fallback_bpe, byte_fallback_unigram, word_pieces)
