"""Reads the tokenizer of a model folder into `TokenizerData`.

A `tokenizer.json` is taken as it is, in some hundredths of a second. Only a folder without one needs transformers to convert
what it has; the result is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cacheflow.errors import CheckpointError
from cacheflow.loading.cache import cache_folder, write_whole
from cacheflow.loading.folder import read_json_if_there
from cacheflow.types import TokenizerData

logger = logging.getLogger(__name__)

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SOURCES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
"""What a conversion may read: its result is cached under their content."""


def read_tokenizer(folder: Path) -> TokenizerData:
    """The folder's tokenizer, chat template and the ids that end a text.

    Raises:
        CheckpointError: The files are missing or damaged.
    """
    from tokenizers import Tokenizer

    settings = read_json_if_there(folder / "special_tokens_map.json") | read_json_if_there(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else _converted(folder)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing more particular.
        raise CheckpointError(f"{file} can't be read: {error}. Fetch the file again.") from error
    special_tokens = {name: _token_text(settings[name]) for name in _SPECIAL_NAMES if settings.get(name)}
    bos = tokenizer.token_to_id(special_tokens.get("bos_token", ""))
    eos = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
    return TokenizerData(
        tokenizer_json=text,
        chat_template=_chat_template(folder, settings),
        special_tokens=special_tokens,
        bos_token_id=bos,
        eos_token_ids=_eos_token_ids(folder, eos),
        add_bos=bos is not None and _adds_bos(tokenizer, settings, bos),
    )


def _token_text(value: Any) -> str:
    """A special token is written as text or as an object with its text in it."""
    return str(value["content"] if isinstance(value, Mapping) else value)


def _adds_bos(tokenizer: Any, settings: Mapping[str, Any], bos: int) -> bool:
    """Whether a text begins with the BOS token: as the settings say, else as the tokenizer itself does."""
    chosen = settings.get("add_bos_token")
    return bool(tokenizer.encode("a").ids[:1] == [bos] if chosen is None else chosen)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # Several by name; the others are for tools and retrieval.
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _eos_token_ids(folder: Path, eos: int | None) -> list[int]:
    """The tokenizer's own first, then what the generation configuration (before it existed: the model's) says."""
    file = folder / "generation_config.json"
    settings = read_json_if_there(file if file.exists() else folder / "config.json")
    named = settings.get("eos_token_id")
    ids = [eos, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))


def _converted(folder: Path) -> str:
    """`tokenizer.json` for a folder that has only older forms, from the cache or by conversion."""
    digest = hashlib.sha256(f"transformers {version('transformers')}".encode())
    present = [name for name in _SOURCES if (folder / name).is_file()]
    for name in present:
        digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    cached = cache_folder() / "tokenizers" / f"{digest.hexdigest()}.json"
    if cached.is_file():
        return cached.read_text(encoding="utf-8")
    if not set(present) - {"config.json", "tokenizer_config.json", "special_tokens_map.json"}:
        raise CheckpointError(f"{folder} has no tokenizer files. Name a folder or hub model that has, with --tokenizer.")
    text = _convert(folder)
    try:
        write_whole(cached, text)
    except OSError as error:
        logger.warning("the converted tokenizer can't be kept for the next start: %s", error)
    return text


def _convert(folder: Path) -> str:
    from transformers import AutoTokenizer

    logger.info("converting the tokenizer of %s", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        return str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # Each kind of tokenizer raises its own.
        raise CheckpointError(
            f"The tokenizer of {folder} can't be converted ({type(error).__name__}: {error}). "
            f"Name a folder or hub model with a tokenizer.json, with --tokenizer."
        ) from error
