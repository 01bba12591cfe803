"""From what a user calls a model to files on this machine: a folder, a GGUF file, a hub name, or "demo".

Only configurations, tokenizers and weights are fetched from the hub, never code. Nothing is substituted: what can't be found
is an error that says what to do. It opens no weights and imports no torch.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cacheflow.config import EngineConfig
from cacheflow.errors import CheckpointError, ModelNotFoundError, PluginError
from cacheflow.interfaces import WeightLoader
from cacheflow.loading.demo import DEMO, demo_file
from cacheflow.loading.tokenizer_files import read_tokenizer
from cacheflow.plugins import load_plugin, select_plugin
from cacheflow.types import TokenizerData

logger = logging.getLogger(__name__)

_GROUP = "cacheflow.weight_loaders"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DESCRIPTIONS = ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
"""In the order in which a repository's forms are preferred: only the first that it has is fetched."""
_HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        name: What the user called it.
        path: A folder or a file.
        loader: What reads it.
    """

    name: str
    path: Path
    loader: type[WeightLoader]

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """Its configuration in the form of a `config.json`.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return self.loader.config(self.path)


def resolve_model(config: EngineConfig) -> ModelFiles:
    """Finds the model, and fetches it if it has to.

    Raises:
        ModelNotFoundError: It is neither here nor to be fetched.
        CheckpointError: It is here, but no loader can read it.
    """
    if config.use_dummy_weights or config.load_format == "dummy":
        path = _find(config.model, config.download_dir, ())
        return ModelFiles(config.model, path, load_plugin(_GROUP, "dummy").with_seed(config.seed))
    path = _find(config.model, config.download_dir, _WEIGHTS)
    return ModelFiles(config.model, path, _choose_loader(path, config.load_format))


def tokenizer_data(files: ModelFiles, config: EngineConfig) -> TokenizerData:
    """The tokenizer that `config` asks for: the model's own, or another's.

    Raises:
        ModelNotFoundError: The other one is neither here nor to be fetched.
        CheckpointError: It is missing or damaged.
    """
    if config.tokenizer is None or config.tokenizer == config.model:
        return files.loader.tokenizer(files.path)
    path = _find(config.tokenizer, config.download_dir, ())
    if path.is_dir():
        return read_tokenizer(path)
    return _choose_loader(path, "auto").tokenizer(path)


def _choose_loader(path: Path, load_format: str) -> type[WeightLoader]:
    try:
        loader: type[WeightLoader] = select_plugin(_GROUP, load_format, path)[1]
    except PluginError as error:
        raise CheckpointError(f"{path} can't be read as a model. {error}") from error
    return loader


def _find(model: str, download_dir: str | None, weights: tuple[str, ...]) -> Path:
    """The folder or file of a model, without weights if `weights` is empty."""
    if model == DEMO:
        return demo_file()
    path = Path(os.path.expanduser(model))  # Path's own raises for a user that there is not.
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(model) or model.endswith(".gguf"):
        raise ModelNotFoundError(f"There is no model at {model}. Give a folder, a GGUF file, a hub name, or --model {DEMO}.")
    return _find_on_hub(model, download_dir, weights)


def _find_on_hub(name: str, download_dir: str | None, weights: tuple[str, ...]) -> Path:
    """The snapshot of a hub model, from the hub or, when that can't be reached, from its cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        patterns = _patterns_to_fetch([sibling.rfilename for sibling in info.siblings or ()], weights)
        fetched = huggingface_hub.snapshot_download(
            name, cache_dir=download_dir, allow_patterns=patterns, ignore_patterns="*/*"
        )
        return Path(fetched)
    except HFValidationError as error:
        raise ModelNotFoundError(f"There is no model at {name}, and the hub can't have one of that name: {error}") from error
    except OfflineModeIsEnabled:
        reason = "the hub library is in offline mode"
    except HfHubHTTPError as error:
        reason = f"the hub refused it (status {error.response.status_code}): it has no such model, or not for you"
    except Exception as error:  # Each transport raises its own errors for a network that is not there.
        reason = f"the hub can't be reached ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
    try:
        found = Path(huggingface_hub.snapshot_download(name, cache_dir=download_dir, local_files_only=True))
        logger.info("%s: %s; what its cache has of the model is taken", name, reason)
        return found
    except LocalEntryNotFoundError:
        folder = download_dir or huggingface_hub.constants.HF_HUB_CACHE
        raise ModelNotFoundError(
            f"The model {name!r} is not a folder here and not in the hub cache {folder}, and {reason}. Give the folder of a "
            f"model that you have, or --model {DEMO} (SmolLM2-135M-Instruct), which needs no hub."
        ) from None


def _patterns_to_fetch(file_names: list[str], weights: tuple[str, ...]) -> list[str]:
    """Patterns for descriptions, and for the preferred one of the forms in which the repository has weights."""
    import fnmatch

    present = [pattern for pattern in weights if any(fnmatch.fnmatch(name, pattern) and "/" not in name for name in file_names)]
    return [*_DESCRIPTIONS, *present[:1]]
