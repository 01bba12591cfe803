"""A real model that says what it is told to say: each token has one successor, whatever came before it.

Its embedding is one-hot, its layer adds nothing, and its head is the table of successors. So tests can have a chat model that
calls tools, in the markers of Hermes and Qwen, and see the whole way from its tokens to a client.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import llama_shapes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN_SIZE = 512
SPECIAL_TOKENS = ("<|im_end|>", "<|im_start|>", "<|tools|>", "<|answer|>")
WORDS = ("Hello", " there", "Ġ", "ð", "Ł", "ĺ", "Ģ", ", how", " are", " you", "?")
"""Among them the four bytes of an emoji, a token each."""
CALLS = (
    "Let me", " look.", "\n<tool_", 'call>\n{"name": "get_', 'weather", "argu', 'ments": {"city": "Pa', 'ris", "days": ',
    "[1, ", "2]}}\n</tool", "_call>\n<tool_call>", '{"name": "get_time", ', '"arguments": {}}</', "tool_call>",
)  # fmt: skip
ANSWER = ("It is", " sunny", " in Paris.")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call them within <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant"
    "{% if messages[-1].role == 'tool' %}<|answer|>{% elif tools %}<|tools|>{% else %}{{ '\n' }}{% endif %}{% endif %}"
)


def write_scripted_llama(folder: Path) -> Path:
    """Writes the checkpoint: it greets; given tools it calls two of them; given a tool's result it says what the weather is.

    Args:
        folder: Made if it is missing.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    scripts = {"Ċ": WORDS, "<|tools|>": CALLS, "<|answer|>": ANSWER}
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": 8,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
    }
    weights = {name: torch.zeros(shape) for name, shape in llama_shapes(config).items()}
    for name, weight in weights.items():
        if "norm" in name:
            weight.fill_(1.0)
    weights["model.embed_tokens.weight"].fill_diagonal_(1.0)
    for start, script in scripts.items():
        for token, successor in pairwise((start, *script, SPECIAL_TOKENS[0])):
            weights["lm_head.weight"][tokenizer.token_to_id(successor), tokenizer.token_to_id(token)] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "chat_template": TEMPLATE,
        "eos_token": SPECIAL_TOKENS[0],
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def _tokenizer() -> Tokenizer:
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    pieces = [piece for piece in (*WORDS, *CALLS, *ANSWER) if piece not in tokens]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer
