"""From a model's name to its files, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_llama

from cacheflow.config import EngineConfig
from cacheflow.errors import CheckpointError, ModelNotFoundError
from cacheflow.loading.resolve import _patterns_to_fetch, resolve_model, tokenizer_data


def test_a_hub_name_is_found_in_the_hub_cache(hub_cache: Path) -> None:
    files = resolve_model(EngineConfig(model="facebook/opt-125m", download_dir=str(hub_cache)))
    assert files.name == "facebook/opt-125m"
    assert files.hf_config["architectures"] == ["OPTForCausalLM"]


def test_a_hub_name_that_is_not_cached_names_the_demo_and_the_cache(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"facebook/opt-125m.*offline.*--model demo") as caught:
        resolve_model(EngineConfig(model="facebook/opt-125m", download_dir=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./here.gguf", "models/missing.gguf", "a/b/c", "../up", "~nobody-here/m"])
def test_a_path_without_a_model_is_an_error_that_repeats_it(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=name):
        resolve_model(EngineConfig(model=name))


def test_a_folder_without_weights_lists_what_each_loader_missed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(EngineConfig(model=str(tmp_path)))
    for reason in ("no model.safetensors", "no pytorch_model.bin", "0 *.gguf files"):
        assert reason in str(caught.value)


def test_an_explicit_format_that_is_not_there_is_an_error(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin"):
        resolve_model(EngineConfig(model=str(tiny_llama), load_format="bin"))


def test_safetensors_are_preferred_to_bin_files(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert resolve_model(EngineConfig(model=str(folder))).loader.__name__ == "SafetensorsLoader"


def test_the_tokenizer_can_be_another_models(tiny_llama: Path, hub_cache: Path) -> None:
    config = EngineConfig(model=str(tiny_llama), tokenizer="facebook/opt-125m", download_dir=str(hub_cache))
    assert tokenizer_data(resolve_model(config), config).bos_token_id == 2


def test_only_one_form_of_weights_and_no_code_is_fetched() -> None:
    weights = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
    files = ["config.json", "modeling.py", "pytorch_model.bin", "model.safetensors", "onnx/model.onnx", "tf_model.h5"]
    assert _patterns_to_fetch(files, weights)[-1] == "*.safetensors"
    assert "pytorch_model*.bin" not in _patterns_to_fetch(files, weights)
    assert _patterns_to_fetch(["pytorch_model.bin", "flax_model.msgpack"], weights)[-1] == "pytorch_model*.bin"
    assert not any("py" in pattern.split(".")[-1] for pattern in _patterns_to_fetch(files, weights))


def test_resolving_and_reading_a_tokenizer_import_neither_torch_nor_transformers(tiny_llama: Path) -> None:
    program = f"""
import sys
from cacheflow.config import EngineConfig
from cacheflow.loading import tokenizer_data
from cacheflow.loading.resolve import resolve_model
config = EngineConfig(model={str(tiny_llama)!r})
files = resolve_model(config)
assert tokenizer_data(files, config).add_bos and files.hf_config
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
