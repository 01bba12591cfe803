"""Tokenizers of model folders, against what transformers makes of the same folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny import LLAMA_CHAT_TEMPLATE
from tokenizers import Tokenizer

from cacheflow.errors import CheckpointError
from cacheflow.loading.tokenizer_files import read_tokenizer

TEXTS = ("Hello, my name is", "3.14 and 日本 😀", "  two  spaces", "</s> in the middle")


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt"])
def test_ids_equal_those_of_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder: Path = request.getfixturevalue(model)
    data, original = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_str(data.tokenizer_json)
    for text in TEXTS:
        bos = [data.bos_token_id] if data.add_bos else []
        assert bos + tokenizer.encode(text, add_special_tokens=False).ids == original(text).input_ids


def test_opt_begins_a_text_with_the_token_that_ends_one(tiny_opt: Path) -> None:
    data = read_tokenizer(tiny_opt)
    assert (data.bos_token_id, data.eos_token_ids, data.add_bos) == (2, [2], True)


def test_a_converted_tokenizer_is_kept_and_needs_no_transformers_again(
    tiny_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path))
    first = read_tokenizer(tiny_opt)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert read_tokenizer(tiny_opt) == first


def test_a_cache_that_can_not_be_written_costs_only_time(
    tiny_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path / "file"))
    assert read_tokenizer(tiny_opt).bos_token_id == 2


def test_special_tokens_and_chat_template_come_along(tiny_llama: Path) -> None:
    data = read_tokenizer(tiny_llama)
    assert data.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert data.chat_template == LLAMA_CHAT_TEMPLATE


def test_a_template_file_goes_before_the_one_in_the_settings(llama: Path) -> None:
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    assert read_tokenizer(llama).chat_template == "{{ messages }}"


def test_all_ids_of_the_generation_configuration_end_a_text(llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    assert read_tokenizer(llama).eos_token_ids == [2, 7, 9]


def test_without_generation_configuration_the_models_own_counts(llama: Path) -> None:
    (llama / "generation_config.json").unlink()
    assert read_tokenizer(llama).eos_token_ids == [2]


@pytest.mark.parametrize(("setting", "expected"), [(True, True), (False, False), (None, True)])
def test_the_settings_say_whether_a_text_begins_with_bos_else_the_tokenizer(
    llama: Path, setting: bool | None, expected: bool
) -> None:
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": setting}))
    assert read_tokenizer(llama).add_bos is expected


def test_a_damaged_tokenizer_is_an_error(llama: Path) -> None:
    (llama / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_tokenizer(llama)


def test_a_folder_without_tokenizer_is_an_error(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="--tokenizer"):
        read_tokenizer(llama)
