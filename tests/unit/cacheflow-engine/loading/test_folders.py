"""Model folders: safetensors and .bin files, whole, divided, damaged, hostile."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cacheflow.errors import CheckpointError, UnsupportedModelError
from cacheflow.loading.model import LoadedModel

Load = Callable[..., LoadedModel]
LogitsOf = Callable[[LoadedModel], torch.Tensor]


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


@pytest.fixture
def opt(tiny_opt: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_opt, tmp_path / "opt"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def divide(folder: Path, single: str, weights: dict[str, torch.Tensor], save: Callable[..., None]) -> None:
    """Replaces a checkpoint by two files and an index."""
    stem, suffix = single.split(".")
    names = list(weights)
    parts = {f"{stem}-00001-of-00002.{suffix}": names[::2], f"{stem}-00002-of-00002.{suffix}": names[1::2]}
    for file, members in parts.items():
        save({name: weights[name].clone() for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / f"{single}.index.json").write_text(json.dumps(index))
    (folder / single).unlink()


def test_divided_safetensors_load_like_whole_ones(llama: Path, tiny_llama: Path, load: Load, logits_of: LogitsOf) -> None:
    divide(llama, "model.safetensors", load_file(llama / "model.safetensors"), save_file)
    assert torch.equal(logits_of(load(llama)), logits_of(load(tiny_llama)))


def test_divided_bin_files_load_like_whole_ones(opt: Path, tiny_opt: Path, load: Load, logits_of: LogitsOf) -> None:
    divide(opt, "pytorch_model.bin", torch.load(opt / "pytorch_model.bin", weights_only=True), torch.save)
    assert torch.equal(logits_of(load(opt)), logits_of(load(tiny_opt)))


def test_bin_files_of_before_torch_1_6_load(opt: Path, tiny_opt: Path, load: Load, logits_of: LogitsOf) -> None:
    weights = torch.load(opt / "pytorch_model.bin", weights_only=True)
    torch.save(weights, opt / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(logits_of(load(opt)), logits_of(load(tiny_opt)))


def test_a_missing_part_of_a_divided_checkpoint_is_named(llama: Path, load: Load) -> None:
    divide(llama, "model.safetensors", load_file(llama / "model.safetensors"), save_file)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is missing"):
        load(llama)


def test_an_index_can_not_reach_outside_its_folder(llama: Path, tmp_path: Path, load: Load) -> None:
    shutil.move(llama / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name"):
        load(llama)


class RunsCode:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._trace),)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_bin_file_with_code_in_it_is_refused_and_the_code_does_not_run(
    opt: Path, tmp_path: Path, load: Load, is_archive: bool
) -> None:
    trace = tmp_path / "code-ran"
    torch.save({"weight": RunsCode(trace)}, opt / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)
    with pytest.raises(CheckpointError, match="never loaded"):
        load(opt)
    assert not trace.exists()


@pytest.mark.parametrize("content", [RunsCode(Path("code-ran")), b"garbage" * 50])
def test_a_refused_bin_file_comes_with_its_reason_and_without_advice_to_trust_it(opt: Path, load: Load, content: Any) -> None:
    if isinstance(content, bytes):
        (opt / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save({"weight": content}, opt / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"\((Unsupported operand 103|Trying to load unsupported GLOBAL .* is blocked)\)"
    ) as e:
        load(opt)
    assert "weights_only" not in str(e.value)
    assert "Re-running" not in str(e.value)


def test_a_bare_pickle_is_refused(opt: Path, tmp_path: Path, load: Load) -> None:
    (opt / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "code-ran"), protocol=2))
    with pytest.raises(CheckpointError):
        load(opt)
    assert not (tmp_path / "code-ran").exists()


def test_a_bin_file_that_holds_no_tensors_by_name_is_refused(opt: Path, load: Load) -> None:
    torch.save([torch.ones(2)], opt / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="tensors by name"):
        load(opt)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(llama: Path, opt: Path, load: Load, file: str, share: float) -> None:
    folder = llama if file.endswith("safetensors") else opt
    os.truncate(folder / file, int((folder / file).stat().st_size * share))
    with pytest.raises(CheckpointError, match=file):
        load(folder)


def test_a_safetensors_header_that_asks_for_more_than_the_file_holds_is_refused(llama: Path, load: Load) -> None:
    header = b'{"model.norm.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    (llama / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load(llama)


def test_missing_tensors_are_named(llama: Path, load: Load) -> None:
    change_weights(llama, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of 21 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama)


def test_a_tensor_without_a_place_is_an_error(llama: Path, load: Load) -> None:
    change_weights(llama, lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 3)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight \[2, 3\]"):
        load(llama)


def test_known_buffers_are_not_in_the_way(llama: Path, load: Load) -> None:
    change_weights(llama, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(llama)


def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(llama: Path, load: Load) -> None:
    change_weights(llama, lambda weights: weights.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has the shape \[65\].*\[64\]"):
        load(llama)


def test_quantised_integers_are_not_taken_for_weights(llama: Path, load: Load) -> None:
    change_weights(llama, lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="int8"):
        load(llama)


def test_an_announced_quantisation_is_refused_by_name(llama: Path, load: Load) -> None:
    change_config(llama, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="gptq"):
        load(llama)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(llama: Path, load: Load) -> None:
    change_config(llama, architectures=["NoSuchForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"NoSuchForCausalLM.*LlamaForCausalLM.*OPTForCausalLM"):
        load(llama)


def test_a_configuration_without_architecture_is_refused(llama: Path, load: Load) -> None:
    change_config(llama, architectures=None)
    with pytest.raises(UnsupportedModelError, match="names no architecture"):
        load(llama)


@pytest.mark.parametrize("scaling", ["yarn", "dynamic", "longrope"])
def test_a_rotary_scaling_that_is_not_implemented_is_named(llama: Path, load: Load, scaling: str) -> None:
    change_config(llama, rope_scaling={"type": scaling, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match=scaling):
        load(llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 0},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3, "head_dim": 16},
        {"max_position_embeddings": 10**15},
        {"vocab_size": -1},
    ],
)
def test_a_configuration_that_makes_no_sense_is_an_error(llama: Path, load: Load, changes: dict[str, Any]) -> None:
    change_config(llama, **changes)
    with pytest.raises(CheckpointError, match="configuration"):
        load(llama)


def test_a_missing_entry_of_the_configuration_is_named(llama: Path, load: Load) -> None:
    config = json.loads((llama / "config.json").read_text())
    del config["hidden_size"]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="hidden_size"):
        load(llama)


def test_a_folder_without_configuration_is_an_error(llama: Path, load: Load) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(llama)


def test_code_of_a_model_is_not_run_and_the_log_says_so(
    llama: Path, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    (llama / "modeling.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'code-ran')!r})\n")
    change_config(llama, auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"})
    with caplog.at_level("WARNING"):
        load(llama)
    assert "auto_map" in caplog.text
    assert not (tmp_path / "code-ran").exists()


def test_random_weights_need_only_the_configuration_and_follow_the_seed(llama: Path, load: Load, logits_of: LogitsOf) -> None:
    (llama / "model.safetensors").unlink()
    first, again, other = (load(llama, use_dummy_weights=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits_of(first), logits_of(again))
    assert not torch.equal(logits_of(first), logits_of(other))


def test_random_weights_never_stand_in_for_missing_ones(llama: Path, load: Load) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="use-dummy-weights"):
        load(llama)
