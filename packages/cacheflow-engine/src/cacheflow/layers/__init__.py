"""The parts that models are made of. Public: a model plugin may import all that is named here."""

from __future__ import annotations

from cacheflow.layers.context import BuildContext
from cacheflow.layers.decoder import fused_decoder
from cacheflow.layers.modules import Embedding, LayerNorm, Linear, OutputHead, RMSNorm
from cacheflow.layers.parallel import ParallelGroup, SingleRank
from cacheflow.layers.rotary import Rotary, rope_max_positions

__all__ = [
    "BuildContext",
    "Embedding",
    "LayerNorm",
    "Linear",
    "OutputHead",
    "ParallelGroup",
    "RMSNorm",
    "Rotary",
    "SingleRank",
    "fused_decoder",
    "rope_max_positions",
]
