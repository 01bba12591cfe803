"""The seams: what each plugin group's members must offer, and the frozen data they exchange with the engine.

Every interface is a `Protocol`: a plugin satisfies it by its shape and needs to inherit nothing. `supports(...)` always
answers with the tuple of *reasons why not*; an empty one means yes. There is a module for each group; plugins import from
here. This package imports torch for type checking only.
"""

from __future__ import annotations

from cacheflow.interfaces.attention_backends import AttentionBackend, AttentionMetadata, KVCacheSpec
from cacheflow.interfaces.executors import (
    UNKNOWN_TOKEN,
    Capacity,
    Executor,
    Pending,
    Sample,
    SampleSpec,
    ScheduledSequence,
    Step,
    StepOutput,
)
from cacheflow.interfaces.frontends import Frontend
from cacheflow.interfaces.logits_processors import LogitsProcessor, ProcessorContext, ProcessorRow
from cacheflow.interfaces.models import Architecture, Attend, AttentionSpec, ModelSpec
from cacheflow.interfaces.op_providers import LINEAR_FORMS, QUANTISATION_GROUP, OpProvider, OpSpec
from cacheflow.interfaces.schedulers import RequestView, SchedulingPolicy
from cacheflow.interfaces.weight_loaders import WeightLoader

__all__ = [
    "CONTRACT_VERSION",
    "LINEAR_FORMS",
    "QUANTISATION_GROUP",
    "UNKNOWN_TOKEN",
    "Architecture",
    "Attend",
    "AttentionBackend",
    "AttentionMetadata",
    "AttentionSpec",
    "Capacity",
    "Executor",
    "Frontend",
    "KVCacheSpec",
    "LogitsProcessor",
    "ModelSpec",
    "OpProvider",
    "OpSpec",
    "Pending",
    "ProcessorContext",
    "ProcessorRow",
    "RequestView",
    "Sample",
    "SampleSpec",
    "ScheduledSequence",
    "SchedulingPolicy",
    "Step",
    "StepOutput",
    "WeightLoader",
]

CONTRACT_VERSION = 1
"""The version of all these interfaces. A plugin that declares another one is refused with a sentence saying so."""
