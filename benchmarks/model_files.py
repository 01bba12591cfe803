"""Writes models in the forms that other engines read: a Hugging Face folder in bfloat16, and a bfloat16 GGUF file.

There is no hub where the benchmarks run, and every system must compute with the same weights. Those of the demo come from its
GGUF. For W6 they are random, in the shape of Llama-3.2-1B: 2.5 GB in each form.

    python benchmarks/model_files.py FOLDER             # FOLDER/hf, FOLDER/model-bf16.gguf
    python benchmarks/model_files.py FOLDER --random    # the same of the 1B shape

What is there already stays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from cacheflow.config import EngineConfig
from cacheflow.loading.demo import demo_file
from cacheflow.loading.resolve import resolve_model

LLAMA_1B_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
LLAMA_1B_SHAPES = {
    "attn_q": ("self_attn.q_proj", (2048, 2048)),
    "attn_k": ("self_attn.k_proj", (512, 2048)),
    "attn_v": ("self_attn.v_proj", (512, 2048)),
    "attn_output": ("self_attn.o_proj", (2048, 2048)),
    "ffn_gate": ("mlp.gate_proj", (8192, 2048)),
    "ffn_up": ("mlp.up_proj", (8192, 2048)),
    "ffn_down": ("mlp.down_proj", (2048, 8192)),
    "attn_norm": ("input_layernorm", (2048,)),
    "ffn_norm": ("post_attention_layernorm", (2048,)),
}
"""Of a layer's tensors: the name in a GGUF file to that of Hugging Face, and the sizes."""
STANDARD_DEVIATION = 0.02


def write_hf_folder(folder: Path) -> None:
    """`config.json`, `model.safetensors`, and the tokenizer, without which no server turns ids back into text."""
    files = resolve_model(EngineConfig(model="demo"))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in files.hf_config.items() if value is not None}
    settings |= {"model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in files.loader.tensors(files.path)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """The demo's, in the two files that transformers reads."""
    files = resolve_model(EngineConfig(model="demo"))
    data = files.loader.tokenizer(files.path)
    (folder / "tokenizer.json").write_text(data.tokenizer_json, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **data.special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def write_gguf(path: Path) -> None:
    """The demo's GGUF with its matrices widened to bfloat16; vectors stay float32, as llama.cpp wants them."""
    reader = GGUFReader(demo_file())
    writer = GGUFWriter(path, arch=reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        form = GGMLQuantizationType.F32 if values.ndim == 1 else GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, quantize(values, form), raw_dtype=form)
    _finish(writer)


def random_tensors() -> Iterator[tuple[str, str, torch.Tensor]]:
    """Of the 1B shape: each tensor's name in a GGUF file, its name in Hugging Face's, and itself."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*sizes: int) -> torch.Tensor:
        if len(sizes) == 1:
            return torch.ones(sizes, dtype=torch.bfloat16)
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(std=STANDARD_DEVIATION, generator=generator)

    yield "token_embd.weight", "model.embed_tokens.weight", tensor(128_256, 2048)
    yield "output_norm.weight", "model.norm.weight", tensor(2048)
    for layer in range(16):
        for name, (hf_name, sizes) in LLAMA_1B_SHAPES.items():
            yield f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{hf_name}.weight", tensor(*sizes)


def write_random(folder: Path) -> None:
    """Both forms of the 1B shape; there are no texts, so the GGUF file says that it has no tokenizer."""
    if (folder / "model-bf16.gguf").exists():
        return
    tensors = list(random_tensors())
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    (folder / "hf" / "config.json").write_text(json.dumps(LLAMA_1B_CONFIG, indent=2))
    save_file({name: tensor for _, name, tensor in tensors}, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    writer = GGUFWriter(folder / "model-bf16.gguf", arch="llama")
    writer.add_context_length(131_072)
    writer.add_embedding_length(2048)
    writer.add_feed_forward_length(8192)
    writer.add_block_count(16)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(128_256)
    writer.add_tokenizer_model("none")
    for name, _, tensor in tensors:
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_demo(folder: Path, with_gguf: bool = True) -> None:
    """Both forms of the demo model, or its Hugging Face folder alone."""
    if not (folder / "hf" / "tokenizer.json").exists():
        write_hf_folder(folder / "hf")
    if with_gguf and not (folder / "model-bf16.gguf").exists():
        write_gguf(folder / "model-bf16.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", action="store_true", help="random weights in the shape of Llama-3.2-1B")
    arguments = parser.parse_args()
    (write_random if arguments.random else write_demo)(arguments.folder)


if __name__ == "__main__":
    main()
