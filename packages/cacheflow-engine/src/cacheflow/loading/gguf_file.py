"""Reads GGUF files: one file with weights (plain or quantised), configuration and tokenizer.

Weights are given in float32 (plain ones in their own dtype) under their Hugging Face names; what llama.cpp's converter
rearranged is put back. Quantised forms are unpacked by the `gguf` library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cacheflow.errors import CheckpointError, UnsupportedModelError
from cacheflow.interfaces import CONTRACT_VERSION
from cacheflow.loading.gguf_format import GGUFHeader, GGUFTensor, read_header
from cacheflow.types import TokenizerData

if TYPE_CHECKING:
    import numpy
    import torch

_Value = TypeVar("_Value", int, float, str)

_ARCHITECTURES = {"llama": "LlamaForCausalLM"}
_FILE_DTYPES = {0: "float32", 1: "float16", 32: "bfloat16"}
"""`general.file_type` of files that are not quantised."""
_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFLoader:
    """The weight loader `gguf`."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    priority: ClassVar[int] = 10

    @classmethod
    def supports(cls, path: Path) -> tuple[str, ...]:
        """Whether it is a GGUF file, or a folder with exactly one."""
        if path.is_file():
            return () if path.suffix == ".gguf" else (f"{path.name} is not called *.gguf",)
        count = sum(1 for _ in path.glob("*.gguf")) if path.is_dir() else 0
        return () if count == 1 else (f"{count} *.gguf files in {path}; name the one you want",)

    @classmethod
    def config(cls, path: Path) -> dict[str, Any]:
        """The metadata in the form of a `config.json`. A quantised file has no `dtype`."""
        file = _file(path)
        header = _header(file)
        return _Metadata(file, header).config()

    @classmethod
    def tokenizer(cls, path: Path) -> TokenizerData:
        """The tokenizer in the metadata."""
        from cacheflow.loading.gguf_tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(_header(_file(path)).metadata)

    @classmethod
    def tensors(cls, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, unpacked one at a time."""
        import numpy

        file = _file(path)
        header = _header(file)
        config = _Metadata(file, header).config()
        num_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        content = numpy.memmap(file, mode="r", dtype=numpy.uint8)
        for name, place in header.tensors.items():
            if name == _ROPE_FACTORS:
                continue
            layer, part, kind = _parse_name(name)
            tensor = _unpack(content, place)
            if part in num_heads:
                tensor = _interleave_back(tensor, num_heads[part])
            yield f"{layer}{_NAMES[part]}.{kind}", tensor


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    found = list(path.glob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(f"There are {len(found)} *.gguf files in {path}. Name the one you want.")
    return found[0]


def _header(file: Path) -> GGUFHeader:
    """The header, read once for configuration, tokenizer and weights."""
    status = file.stat()
    return _read_header(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_header(file: Path, size: int, modified_ns: int) -> GGUFHeader:
    from gguf import GGML_QUANT_SIZES

    sizes = {int(kind): block for kind, block in GGML_QUANT_SIZES.items()}
    return read_header(file, sizes.get)


class _Metadata:
    """The model's numbers in a header. Those that arrays are made from are held against the tensors that are really there."""

    def __init__(self, file: Path, header: GGUFHeader) -> None:
        self._file, self._tensors, self._entries = file, header.tensors, header.metadata
        self._architecture: str = self._entry("general.architecture", "")

    def config(self) -> dict[str, Any]:
        num_experts, num_parts = self._get("expert_count", 0), self._entry("split.count", 1)
        if self._architecture not in _ARCHITECTURES or num_experts:
            raise UnsupportedModelError(
                f"{self._file.name} holds a model of the GGUF architecture {self._architecture!r} with {num_experts} experts. "
                f"Supported in this form, and without experts: {', '.join(_ARCHITECTURES)}."
            )
        if num_parts > 1:
            raise CheckpointError(f"{self._file.name} is one of {num_parts} parts. Merge them with gguf-split.")
        num_heads, num_layers = self._size("attention.head_count"), self._size("block_count")
        if num_layers > len(self._tensors):
            raise CheckpointError(f"{self._file.name} claims {num_layers} layers but has only {len(self._tensors)} tensors.")
        return {
            "architectures": [_ARCHITECTURES[self._architecture]],
            "hidden_size": self._size("embedding_length", ("token_embd.weight", 1)),
            "intermediate_size": self._size("feed_forward_length", ("blk.0.ffn_up.weight", 0)),
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._get("attention.head_count_kv", num_heads),
            "head_dim": self._get("attention.key_length", 0) or None,
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon", 1e-5),
            "vocab_size": self._length("token_embd.weight", 0),
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_parameters": self._rope_parameters(),
            "dtype": _FILE_DTYPES.get(self._entry("general.file_type", -1)),
        }

    def _rope_parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": self._get("rope.freq_base", 10000.0)}
        scaling = self._get("rope.scaling.type", "none")
        if scaling != "none":
            parameters |= {"rope_type": scaling, "factor": self._get("rope.scaling.factor", 1.0)}
        if _ROPE_FACTORS in self._tensors:
            import numpy

            content = numpy.memmap(self._file, mode="r", dtype=numpy.uint8)
            factors = _unpack(content, self._tensors[_ROPE_FACTORS]).tolist()
            parameters |= {"rope_type": "frequency_factors", "factors": factors}
        return parameters

    def _size(self, key: str, axis: tuple[str, int] | None = None) -> int:
        """A number of at least 1 that must be there, and must be the length of a tensor's axis where one is given."""
        size = self._get(key, 0)
        if size < 1 or (axis is not None and size != self._length(*axis)):
            expected = "1 or more" if axis is None else f"{self._length(*axis)}, as in {axis[0]}"
            raise CheckpointError(f"{self._file.name}: the entry {self._architecture}.{key} is {size}, not {expected}.")
        return size

    def _length(self, tensor: str, axis: int) -> int:
        shape = self._tensors[tensor].shape if tensor in self._tensors else ()
        if len(shape) != 2:
            raise CheckpointError(f"{self._file.name} lacks the matrix {tensor}. It is not a complete model.")
        return shape[axis]

    def _get(self, key: str, default: _Value) -> _Value:
        return self._entry(f"{self._architecture}.{key}", default)

    def _entry(self, key: str, default: _Value) -> _Value:
        """A number or text of the same type as its default."""
        value = self._entries.get(key, default)
        if isinstance(default, float) and isinstance(value, int):
            value = float(value)
        if type(value) is not type(default):
            raise CheckpointError(f"{self._file.name}: the entry {key} is {str(value)[:60]!r}, not a {type(default).__name__}.")
        return value


def _unpack(content: numpy.ndarray[Any, Any], place: GGUFTensor) -> torch.Tensor:
    """One tensor in float32, or in its own dtype if that is a plain one."""
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(place.type_id)
    raw = content[place.start : place.start + place.num_bytes]
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
    if plain is not None:
        return torch.from_numpy(raw.copy()).view(plain).reshape(place.shape)
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    rows = raw.reshape((*place.shape[:-1], place.shape[-1] // block_elements * block_bytes))
    try:
        return torch.from_numpy(dequantize(rows, kind))
    except NotImplementedError as error:
        raise CheckpointError(f"Tensors of type {kind.name} can't be unpacked: {error}. Use another quantisation.") from error


def _parse_name(name: str) -> tuple[str, str, str]:
    """The Hugging Face prefix of a tensor's layer, its part as GGUF calls it, and "weight" or "bias"."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        raise CheckpointError(f"The GGUF file has a tensor {name!r}, which no Llama model has; this variant is not supported.")
    return "" if match[1] is None else f"model.layers.{match[1]}.", match[2], match[3]


def _interleave_back(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp turns pairs (2i, 2i + 1) of q and k where Hugging Face turns (i, i + half); its converter moved the rows."""
    rows = tensor.shape[0]
    if rows % (2 * num_heads):
        raise CheckpointError(f"The GGUF file has {rows} rows of queries or keys for {num_heads} heads, which does not divide.")
    pairs = tensor.reshape(num_heads, rows // num_heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
