"""Writes the demo model in the forms that other engines read: a Hugging Face folder in bfloat16, and a bfloat16 GGUF file.

There is no hub where the benchmarks run, and every system must compute with the same weights: both come from the demo's GGUF.

    python benchmarks/model_files.py FOLDER     # FOLDER/hf/{config.json,model.safetensors}, FOLDER/model-bf16.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from cacheflow.config import EngineConfig
from cacheflow.loading.demo import demo_file
from cacheflow.loading.resolve import resolve_model


def write_hf_folder(folder: Path) -> None:
    """`config.json` and `model.safetensors`; tokens are given to the peers as ids, so there is no tokenizer."""
    files = resolve_model(EngineConfig(model="demo"))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in files.hf_config.items() if value is not None}
    settings |= {"model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in files.loader.tensors(files.path)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Writes what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if not (folder / "hf" / "model.safetensors").exists():
        write_hf_folder(folder / "hf")
    if not (folder / "model-bf16.gguf").exists():
        write_gguf(folder / "model-bf16.gguf")


if __name__ == "__main__":
    main()
