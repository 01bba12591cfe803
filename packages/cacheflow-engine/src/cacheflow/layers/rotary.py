"""Rotary position embedding (arXiv:2104.09864): its settings in a Hugging Face configuration, and its tables.

It does not know how the rotation is computed: an op provider does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cacheflow.errors import UnsupportedModelError

if TYPE_CHECKING:
    from cacheflow.interfaces import OpProvider

_SCALING_TYPES = ("default", "linear", "llama3", "frequency_factors")


def rope_settings(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, whichever way the configuration spells them.

    Newer configurations have one `rope_parameters`; older ones `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    Returns:
        At least `rope_type`, `rope_theta` and `partial_rotary_factor`.

    Raises:
        UnsupportedModelError: The kind of scaling is not implemented.
    """
    settings = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    settings |= {key: hf_config[key] for key in settings if hf_config.get(key) is not None}
    settings |= hf_config.get("rope_scaling") or {}
    settings |= hf_config.get("rope_parameters") or {}
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    if rope_type not in _SCALING_TYPES or any(isinstance(value, Mapping) for value in settings.values()):
        raise UnsupportedModelError(
            f"The rotary scaling {rope_type!r} is not implemented. There are {', '.join(_SCALING_TYPES)}, one for all layers."
        )
    return settings | {"rope_type": rope_type}


def rope_max_positions(hf_config: Mapping[str, Any]) -> int:
    """The longest context that the settings are made for, in tokens."""
    settings = rope_settings(hf_config)
    # Linear scaling is written beside the length *before* scaling; llama3 beside the length after it.
    factor = settings["factor"] if settings["rope_type"] == "linear" else 1
    return int(hf_config["max_position_embeddings"] * factor)


def inverse_frequencies(settings: Mapping[str, Any], rotary_size: int) -> torch.Tensor:
    """Radians per position of each pair: `[rotary_size // 2] float32`."""
    exponents = torch.arange(0, rotary_size, 2, dtype=torch.int64).float() / rotary_size
    frequencies: torch.Tensor = 1.0 / float(settings["rope_theta"]) ** exponents
    match settings["rope_type"]:
        case "linear":
            return frequencies / float(settings["factor"])
        case "llama3":
            return _llama3(frequencies, settings)
        case "frequency_factors":
            return frequencies / torch.tensor(settings["factors"], dtype=torch.float32)
        case _:
            return frequencies


def _llama3(frequencies: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Slow pairs are slowed down by `factor`, fast ones left alone, those between are interpolated (Llama 3.1)."""
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    turns = int(settings["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0, 1)
    return share_kept * frequencies + (1 - share_kept) * frequencies / float(settings["factor"])


class Rotary:
    """Turns queries and keys by their positions. One serves all layers."""

    def __init__(
        self, hf_config: Mapping[str, Any], head_size: int, is_neox: bool, ops: OpProvider, device: torch.device
    ) -> None:
        settings = rope_settings(hf_config)
        rotary_size = int(head_size * settings["partial_rotary_factor"])
        positions = torch.arange(rope_max_positions(hf_config), dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(settings, rotary_size))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
        self.head_size, self.is_neox, self._ops = head_size, is_neox, ops

    def __call__(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`q [num_tokens, num_heads * head_size]` and `k` turned; both may be overwritten."""
        return self._ops.rotary(q, k, positions, self.cos_sin, self.head_size, self.is_neox)
