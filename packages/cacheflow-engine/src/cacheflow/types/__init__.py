"""What a user gives to the engine and gets back, and what the two sides of it say to each other.

Plain frozen dataclasses, validated when they are made. They know no text processing, no torch and no sockets.
"""

from __future__ import annotations

from cacheflow.types.model_info import ModelInfo, TokenizerData
from cacheflow.types.outputs import (
    FINISH_ABORT,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    CompletionOutput,
    EmbeddingOutput,
    Logprobs,
    RequestOutput,
)
from cacheflow.types.requests import EngineRequest, RequestUpdate, ResumedSequence, SequenceUpdate
from cacheflow.types.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_EXTRA_ENTRIES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_STRUCTURE_BYTES,
    SAMPLING_FIELDS,
    SamplingParams,
    StructuredOutput,
    sampling_texts,
)
from cacheflow.types.stats import (
    BLOCK_CACHED,
    BLOCK_FREE,
    BLOCK_OWNED,
    BLOCK_SHARED,
    MAX_VIEWED_REQUESTS,
    EngineStats,
    EngineView,
    RequestSummary,
)

__all__ = [
    "BLOCK_CACHED",
    "BLOCK_FREE",
    "BLOCK_OWNED",
    "BLOCK_SHARED",
    "FINISH_ABORT",
    "FINISH_ERROR",
    "FINISH_LENGTH",
    "FINISH_STOP",
    "MAX_ALLOWED_TOKEN_IDS",
    "MAX_BAD_WORDS",
    "MAX_CHOICES",
    "MAX_EXTRA_ENTRIES",
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "MAX_N",
    "MAX_REGEX_BYTES",
    "MAX_SCHEMA_DEPTH",
    "MAX_STOP_LENGTH",
    "MAX_STOP_STRINGS",
    "MAX_STOP_TOKEN_IDS",
    "MAX_STRUCTURE_BYTES",
    "MAX_VIEWED_REQUESTS",
    "SAMPLING_FIELDS",
    "CompletionOutput",
    "EmbeddingOutput",
    "EngineRequest",
    "EngineStats",
    "EngineView",
    "Logprobs",
    "ModelInfo",
    "RequestOutput",
    "RequestSummary",
    "RequestUpdate",
    "ResumedSequence",
    "SamplingParams",
    "SequenceUpdate",
    "StructuredOutput",
    "TokenizerData",
    "sampling_texts",
]
