"""Builds a model from its files: finds the architecture, declares its parameters, fills and packs them.

It knows no file formats, and code from a model's repository never runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cacheflow.errors import CheckpointError, UnsupportedModelError
from cacheflow.interfaces import Architecture, ModelSpec, OpProvider
from cacheflow.layers import BuildContext, ParallelGroup
from cacheflow.layers.quantization import FORMS
from cacheflow.loading.resolve import ModelFiles
from cacheflow.plugins import find_plugins, load_plugin

logger = logging.getLogger(__name__)

_GROUP = "cacheflow.models"
_MAX_LAYERS = 10_000
_MAX_POSITIONS = 1 << 24
"""Far beyond any model: a configuration that claims more is damaged, and must not make us allocate for it."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: The instance.
        spec: Its numbers.
        architecture: Its name in the `cacheflow.models` group.
    """

    model: Architecture
    spec: ModelSpec
    architecture: str


def find_architecture(hf_config: Mapping[str, Any]) -> tuple[str, type[Architecture]]:
    """The name and the class of the first architecture in the configuration that is installed.

    Raises:
        UnsupportedModelError: None is, or the configuration names none.
    """
    names = hf_config.get("architectures") or []
    installed = find_plugins(_GROUP)
    if not isinstance(names, list) or not names:
        raise UnsupportedModelError(
            f"The model's configuration names no architecture. Supported ones are {', '.join(installed)}; "
            f'add its name to config.json as "architectures": ["…"].'
        )
    for name in names:
        if name in installed:
            return name, load_plugin(_GROUP, name)
    raise UnsupportedModelError(
        f"The architecture {', '.join(map(str, names))} is not supported. Supported ones are {', '.join(installed)}; "
        f"a plugin in the group {_GROUP} can add it."
    )


def read_spec(architecture: type[Architecture], hf_config: Mapping[str, Any]) -> ModelSpec:
    """The model's numbers.

    Raises:
        CheckpointError: An entry of the configuration is missing or makes no sense.
        UnsupportedModelError: A setting is not implemented.
    """
    num_layers = hf_config.get("num_hidden_layers", 1)
    if not isinstance(num_layers, int) or not 1 <= num_layers <= _MAX_LAYERS:
        raise CheckpointError(f"The model's configuration has {num_layers!r} layers; 1 to {_MAX_LAYERS} make sense.")
    try:
        spec = architecture.spec(hf_config)
    except KeyError as error:
        raise CheckpointError(f"The model's configuration lacks the entry {error}. Fetch its config.json again.") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"The model's configuration makes no sense: {error}. Fetch its config.json again.") from error
    numbers = (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_size, spec.hidden_size, spec.vocab_size)
    if min(numbers) < 1 or not 1 <= spec.max_model_len <= _MAX_POSITIONS or spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"The model's configuration makes no sense: {spec.num_layers} layers, {spec.num_heads} heads over "
            f"{spec.num_kv_heads} of keys and values, head size {spec.head_size}, hidden size {spec.hidden_size}, "
            f"vocabulary {spec.vocab_size}, context {spec.max_model_len}. Fetch its config.json again."
        )
    return spec


def load_model(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    ops: OpProvider,
    group: ParallelGroup | None = None,
    quantization: str = "none",
) -> LoadedModel:
    """Loads a model.

    Args:
        files: Where it lies.
        dtype: Of weights and arithmetic; see `loading.dtype.choose_dtype`.
        device: Where it will run.
        ops: Its operations, made for this dtype and device.
        group: The ranks that share it; None: one rank.
        quantization: How its matrices are kept, a name in `layers.quantization.FORMS`.

    Raises:
        UnsupportedModelError: Its architecture, or a setting of it, is not implemented.
        CheckpointError: The files are damaged or don't fit the configuration.
        NotEnoughMemoryError: The device has no room for the weights.
    """
    started_s = time.monotonic()
    hf_config = files.hf_config
    name, architecture = find_architecture(hf_config)
    if hf_config.get("auto_map"):
        logger.warning("%s comes with code of its own (auto_map), which is not run; using cacheflow's %s", files.name, name)
    if hf_config.get("quantization_config"):
        method = hf_config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"{files.name} is quantised ({method}), which is not supported. Use an unquantised checkpoint, or a GGUF file."
        )
    spec = read_spec(architecture, hf_config)
    context = BuildContext(ops, dtype, device, group, FORMS[quantization])
    model = architecture(hf_config, context)
    for tensor_name, tensor in files.loader.tensors(files.path):
        context.load(tensor_name, tensor)
    context.finish()
    words = [name, str(dtype).removeprefix("torch.")] + ([quantization] if quantization != "none" else [])
    logger.info("loaded %s (%s) in %.1f s", files.name, ", ".join(words), time.monotonic() - started_s)
    return LoadedModel(model, spec, name)
