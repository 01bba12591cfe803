"""Tiny models with random weights, written to disk in the forms that real checkpoints have.

Both have 2 layers, hidden size 64, 4 heads and an odd vocabulary of 301 byte-level BPE tokens. They know no language, but
their logits are far from flat, so greedy outputs vary and ties do not occur.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 301
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
OPT_REVISION = "27dcfa74d334bc871f3234de431e71c6eeba5dd6"

CORPUS = (
    "The president of the United States is the head of state and of the government.",
    "The capital of France is Paris, and the future of AI is here to stay.",
    "Hello, my name is Ann and this is the story of the other thing that I am.",
    "San Francisco is a city in the state of California, in the west of the country.",
    "There are 12 months, 365 days and 24 hours in 1 day; the rest is 3.14159.",
    "def add(a, b):\n    return a + b\n\nfor item in items:\n    print(item)\n",
)

LLAMA_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 112,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCAB_SIZE,
}

OPT_CONFIG: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "eos_token_id": 2,
    "ffn_dim": 112,
    "hidden_size": 64,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "vocab_size": VOCAB_SIZE,
    "word_embed_proj_dim": 64,
}


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Random tensors: matrices large enough that each layer changes what comes out, norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            weights[name] = 0.1 * noise
        elif "embed" in name:
            # Weak token and strong position embeddings: with a tied head, strong tokens would just repeat themselves.
            weights[name] = (0.8 if "positions" in name else 0.2) * noise
        else:
            weights[name] = noise * 1.5 / shape[1] ** 0.5
    return weights


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint's tensors."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_size = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size, kv_size = config["num_attention_heads"] * head_size, config["num_key_value_heads"] * head_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        linears = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in linears.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            if config["attention_bias" if name.startswith("self_attn") else "mlp_bias"]:
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
    return shapes


def opt_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an OPT checkpoint's tensors, without the tied `lm_head`."""
    hidden, inner, vocab = config["hidden_size"], config["ffn_dim"], config["vocab_size"]
    width = config["word_embed_proj_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (vocab, width),
        "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    if width != hidden:
        shapes["model.decoder.project_in.weight"] = (hidden, width)
        shapes["model.decoder.project_out.weight"] = (width, hidden)
    if config["do_layer_norm_before"]:
        shapes["model.decoder.final_layer_norm.weight"] = shapes["model.decoder.final_layer_norm.bias"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{layer}"
        linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
        linears |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
        for name, shape in linears.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            shapes[f"{prefix}.{name}.bias"] = shape[:1]
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"{prefix}.{name}.weight"] = shapes[f"{prefix}.{name}.bias"] = (hidden,)
    return shapes


def write_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a Llama checkpoint: `model.safetensors`, `tokenizer.json`, a chat template; float32.

    Args:
        folder: Made if it is missing.
        seed: Of the weights.
        **changes: Entries of `config.json` that differ from `LLAMA_CONFIG`.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LLAMA_CONFIG | changes
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2})
    save_file(random_weights(llama_shapes(config), seed), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "chat_template": LLAMA_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def write_tiny_opt(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes an OPT checkpoint with exactly the files of facebook/opt-125m on the hub: `pytorch_model.bin` in float16,
    `vocab.json` and `merges.txt`; no safetensors, no `tokenizer.json`.

    Args:
        folder: Made if it is missing.
        seed: Of the weights.
        **changes: Entries of `config.json` that differ from `OPT_CONFIG`.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = OPT_CONFIG | changes
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
    weights = {name: tensor.half() for name, tensor in random_weights(opt_shapes(config), seed).items()}
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    tiny_tokenizer().model.save(str(folder))
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokens = {
        name: {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
        for name, text in names.items()
    }
    _write_json(folder / "special_tokens_map.json", tokens)
    tokenizer_config = {
        "errors": "replace",
        **{name: {**token, "__type": "AddedToken"} for name, token in tokens.items()},
        "add_prefix_space": False,
        "add_bos_token": True,
        "special_tokens_map_file": None,
        "tokenizer_class": "GPT2Tokenizer",
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def write_tiny_opt_in_hub_cache(cache_dir: Path, **changes: Any) -> Path:
    """Writes the tiny OPT where the hub library would have cached `facebook/opt-125m`, and returns `cache_dir`."""
    repository = cache_dir / "models--facebook--opt-125m"
    write_tiny_opt(repository / "snapshots" / OPT_REVISION, **changes)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(OPT_REVISION, encoding="utf-8")
    return cache_dir
