"""GGUF files: the same model as its safetensors twin, and refusal of sizes that a file can't hold."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import LLAMA_CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from cacheflow.errors import CacheflowError, CheckpointError, UnsupportedModelError
from cacheflow.loading.gguf_file import GGUFLoader
from cacheflow.loading.model import LoadedModel

Load = Callable[..., LoadedModel]
LogitsOf = Callable[[LoadedModel], torch.Tensor]

PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{PARTS[part]}.weight"
    return f"{PARTS[stem]}.weight"


def permute(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to the rows of q and k: (head, half, i) becomes (head, i, half)."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    folder: Path, file: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32, **entries: int
) -> Path:
    """Writes a Llama folder as a GGUF file, matrices in the given type."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}.get(kind.name, 7))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for key, value in entries.items():
        writer.add_uint32(f"llama.{key}", value)
    tokenizer = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(LLAMA_CHAT_TEMPLATE)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if name.endswith("q_proj.weight"):
            values = permute(values, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            values = permute(values, config["num_key_value_heads"])
        if values.ndim == 1 or values.shape[1] % 32:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_plain_file_gives_the_logits_of_its_safetensors_twin(
    plain: Path, tiny_llama: Path, load: Load, logits_of: LogitsOf
) -> None:
    assert torch.equal(logits_of(load(plain)), logits_of(load(tiny_llama)))


def test_a_folder_with_one_gguf_file_is_that_file(plain: Path, load: Load, logits_of: LogitsOf) -> None:
    assert torch.equal(logits_of(load(plain.parent)), logits_of(load(plain)))


@pytest.mark.parametrize(("kind", "max_error"), [("F16", 0.01), ("BF16", 0.1), ("Q8_0", 0.1), ("Q5_0", 0.5), ("Q4_1", 0.8)])
def test_quantised_files_come_close_to_their_twin(
    tiny_llama: Path, tmp_path: Path, load: Load, logits_of: LogitsOf, kind: str, max_error: float
) -> None:
    file = write_gguf(tiny_llama, tmp_path / "quantised.gguf", gguf.GGMLQuantizationType[kind])
    expected = logits_of(load(tiny_llama))
    error = (logits_of(load(file)) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < max_error


def test_the_stored_dtype_is_known_unless_it_is_quantised(plain: Path, tiny_llama: Path, tmp_path: Path) -> None:
    quantised = write_gguf(tiny_llama, tmp_path / "quantised.gguf", gguf.GGMLQuantizationType.Q8_0)
    assert GGUFLoader.config(plain)["dtype"] == "float32"
    assert GGUFLoader.config(quantised)["dtype"] is None


def test_frequency_factors_in_a_file_slow_the_rotation(plain: Path, tmp_path: Path) -> None:
    reader, factors = gguf.GGUFReader(plain), np.linspace(1, 8, 8, dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "factors.gguf", "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", reader.fields[f"llama.{key}"].contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parameters = GGUFLoader.config(tmp_path / "factors.gguf")["rope_parameters"]
    assert parameters == {"rope_type": "frequency_factors", "rope_theta": 10000.0, "factors": factors.tolist()}
    assert "rope_freqs.weight" not in dict(GGUFLoader.tensors(tmp_path / "factors.gguf"))


def test_the_tokenizer_in_a_file_is_the_one_that_was_written(plain: Path) -> None:
    data = GGUFLoader.tokenizer(plain)
    restored, original = Tokenizer.from_str(data.tokenizer_json), tiny_tokenizer()
    for text in ("Hello, my name is", "def f(x):\n\treturn x ** 12345", "naïve 日本語 😀", " a  b ", "</s>"):
        ids = original.encode(text).ids
        assert restored.encode(text).ids == ids
        assert restored.decode(ids) == original.decode(ids)
    assert (data.bos_token_id, data.eos_token_ids, data.add_bos) == (0, [2], True)
    assert data.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert data.chat_template == LLAMA_CHAT_TEMPLATE


def test_scores_take_the_place_of_merges_in_sentence_piece_files() -> None:
    from cacheflow.loading.gguf_tokenizer import read_gguf_tokenizer

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    original = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replaced = decoders.Replace("▁", " ")
    original.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = ["the president of the united states", "the capital of france is paris", "a thing and another thing"]
    original.train_from_iterator(words, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False))
    model = json.loads(original.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    rank = {"".join(merge): index for index, merge in enumerate(model["merges"])}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token, 1000)) for token in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    data = read_gguf_tokenizer(metadata)
    restored = Tokenizer.from_str(data.tokenizer_json)
    for text in ("the president of france", "another united thing", "x日y 😀", "a  b"):
        ids = restored.encode(text).ids
        assert ids == original.encode(text).ids
        assert restored.decode(ids) == text
    assert data.add_bos


def test_an_unknown_way_of_splitting_words_is_refused(tiny_llama: Path) -> None:
    from cacheflow.loading.gguf_tokenizer import read_gguf_tokenizer

    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "no-such-way",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.merges": [],
    }
    with pytest.raises(CheckpointError, match="no-such-way"):
        read_gguf_tokenizer(metadata)


def test_experts_and_foreign_architectures_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="8 experts"):
        GGUFLoader.config(write_gguf(tiny_llama, tmp_path / "experts.gguf", expert_count=8))
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="mamba"):
        GGUFLoader.config(tmp_path / "mamba.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(num_tensors: int, num_entries: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)


def tensor(dims: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return text("t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


HOSTILE = {
    "empty": b"",
    "another magic": b"GGML" + bytes(100),
    "big-endian version": header(0, 0, version=3 << 24),
    "2^60 tensors": header(2**60, 0) + bytes(64),
    "2^60 entries": header(0, 2**60) + bytes(64),
    "a key of 2^62 bytes": header(0, 1) + struct.pack("<Q", 2**62) + bytes(64),
    "a text of 2^62 bytes": header(0, 1) + text("k") + struct.pack("<IQ", 8, 2**62) + bytes(64),
    "a list of 2^60 numbers": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 2**60) + bytes(64),
    "a list of 2^60 texts": header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(64),
    "lists in lists": header(0, 1) + text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000,
    "an entry of unknown type": header(0, 1) + text("k") + struct.pack("<I", 99) + bytes(64),
    "a million dimensions": header(1, 0) + text("t") + struct.pack("<I", 10**6) + bytes(64),
    "no dimensions": header(1, 0) + tensor([]) + bytes(64),
    "an empty dimension": header(1, 0) + tensor([0, 2**40]) + bytes(64),
    "dimensions whose product overflows 64 bits": header(1, 0) + tensor([2**32, 2**32]) + bytes(64),
    "a tensor larger than the file": header(1, 0) + tensor([2**40]) + bytes(64),
    "an offset behind the file": header(1, 0) + tensor([4], offset=2**63) + bytes(64),
    "a type that does not exist": header(1, 0) + tensor([32], type_id=200) + bytes(64),
    "rows that are no whole blocks": header(1, 0) + tensor([33], type_id=8) + bytes(64),
    "a tensor listed twice": header(2, 0) + tensor([1]) * 2 + bytes(64),
    "an alignment of zero": header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0) + bytes(64),
}


@pytest.mark.parametrize("title", list(HOSTILE))
def test_a_hostile_file_is_refused_before_anything_is_allocated_for_it(tmp_path: Path, title: str) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(HOSTILE[title])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"hostile\.gguf"):
            list(GGUFLoader.tensors(file))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 2**31), ("embedding_length", 2**31), ("feed_forward_length", 2**31), ("context_length", 0)],
)
def test_numbers_that_the_tensors_do_not_bear_out_are_refused(plain: Path, tmp_path: Path, key: str, value: int) -> None:
    content = bytearray(plain.read_bytes())
    at = content.index(text(f"llama.{key}")) + len(text(f"llama.{key}")) + 4
    content[at : at + 4] = struct.pack("<I", value)
    (tmp_path / "changed.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="layers" if key == "block_count" else key):
        GGUFLoader.config(tmp_path / "changed.gguf")


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(plain: Path, tmp_path: Path, share: float) -> None:
    content = plain.read_bytes()
    (tmp_path / "short.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"short\.gguf"):
        list(GGUFLoader.tensors(tmp_path / "short.gguf"))


def read_everything(file: Path) -> None:
    GGUFLoader.config(file)
    GGUFLoader.tokenizer(file)
    for _ in GGUFLoader.tensors(file):
        pass


@given(data=st.data())
def test_a_damaged_header_gives_an_error_of_ours_or_a_model(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(plain.read_bytes())
    header_bytes = gguf.GGUFReader(plain).data_offset
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_bytes - 1))
        content[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    file.write_bytes(content)
    with contextlib.suppress(CacheflowError):
        read_everything(file)
