"""A model folder of a few kilobytes: a tiny Llama's configuration and a tokenizer of bytes, without weights.

With `use_dummy_weights` it is all that an executor or a frontend needs to run for real.
"""

from __future__ import annotations

import json
from pathlib import Path

from cacheflow.config import EngineConfig

VOCAB_SIZE = 259
"""The 256 bytes, and three special tokens."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}


def write_tiny_model(folder: Path) -> EngineConfig:
    """Writes the folder, and gives options that run it on a CPU in float32 with random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<pad>"]
    vocab = {token: index for index, token in enumerate([*alphabet, *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return EngineConfig(
        model=str(folder),
        use_dummy_weights=True,
        dtype="float32",
        device="cpu",
        kv_cache_memory=0.01,
        max_num_seqs=8,
        num_threads=1,
    )
