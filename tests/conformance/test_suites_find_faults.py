"""A suite is worth what it finds: plugins with one fault each, and the check that must find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import click
import pytest
import torch

from cacheflow.attention.torch_backend import TorchAttention
from cacheflow.config import option
from cacheflow.conformance import ConformanceFailure, checks_of
from cacheflow.errors import CheckpointError
from cacheflow.interfaces import Attend, AttentionMetadata, AttentionSpec, KVCacheSpec, ModelSpec, ProcessorRow, RequestView
from cacheflow.layers.torch_ops import TorchOps
from cacheflow.loading.safetensors_files import SafetensorsLoader
from cacheflow.models.llama import Llama
from cacheflow.sampling.processors import MinTokens, Penalties
from cacheflow.sampling.sampler import row_maxima
from cacheflow.scheduling.policies import FCFS


class ForgetsTheWindow(TorchAttention):
    def __init__(self, spec: KVCacheSpec) -> None:
        super().__init__(replace(spec, attention=tuple(replace(layer, window=None) for layer in spec.attention)))

    def forward(self, layer: AttentionSpec, *tensors: Any) -> torch.Tensor:
        return super().forward(replace(layer, window=None), *tensors)


class ForgetsTheSlopes(TorchAttention):
    def forward(self, layer: AttentionSpec, *tensors: Any) -> torch.Tensor:
        return super().forward(replace(layer, alibi_slopes=None), *tensors)


class ForgetsTheSoftCap(TorchAttention):
    def forward(self, layer: AttentionSpec, *tensors: Any) -> torch.Tensor:
        return super().forward(replace(layer, soft_cap=None), *tensors)


class TakesTheWrongScale(TorchAttention):
    def forward(self, layer: AttentionSpec, *tensors: Any) -> torch.Tensor:
        return super().forward(replace(layer, scale=layer.scale * 1.02), *tensors)


class KeepsTheFirstPlan(TorchAttention):
    def plan(self, metadata: AttentionMetadata, into: Any = None) -> Any:
        return super().plan(metadata) if into is None else into


class CopiesOneAfterTheOther(TorchAttention):
    def copy_blocks(self, kv: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        for pair in pairs:
            super().copy_blocks(kv, [pair])


class CopiesTheFirstLayerOnly(TorchAttention):
    def copy_blocks(self, kv: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        super().copy_blocks(kv[:1], pairs)


class SwapsTheFirstLayerOnly(TorchAttention):
    def swap_blocks(
        self, source: Sequence[torch.Tensor], destination: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]
    ) -> None:
        super().swap_blocks(source[:1], destination[:1], pairs)


class RefusesWithoutWords(TorchAttention):
    @classmethod
    def supports(cls, spec: KVCacheSpec) -> Any:
        return ["no"]


class NormsInBfloat16(TorchOps):
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return super().rms_norm(x.bfloat16(), weight.bfloat16(), eps).to(x.dtype)


class ForgetsTheBias(TorchOps):
    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return super().linear(weight, None, form=form, is_gated=is_gated)


class OpensNoGate(TorchOps):
    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        product = super().linear(weight, bias, form=form)
        return (lambda x: product(x)[:, : weight.shape[0] // 2]) if is_gated else product


class QuantisesTooMuch(TorchOps):
    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return super().linear(weight, bias, form="int4" if form == "int8" else form, is_gated=is_gated)


class FindsTheLastPlace(TorchOps):
    def row_maxima(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, _, normalisers = row_maxima(logits)
        return values, logits.shape[1] - 1 - row_maxima(logits.flip(1))[1], normalisers


class DrawsTheMostLikely(TorchOps):
    def draw_rows(self, logits: torch.Tensor, rows: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices, normalisers = row_maxima(logits[rows])
        return indices, values - normalisers


class ForgetsTheFilters(TorchOps):
    def draw_rows(
        self, logits: torch.Tensor, rows: torch.Tensor, temperatures: torch.Tensor, numbers: torch.Tensor, *filters: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = logits[rows].double()
        ends = (wide / temperatures[:, None]).softmax(dim=1).cumsum(dim=1)
        tokens = torch.searchsorted(ends, numbers[:, None] * ends[:, -1:], right=True)
        return tokens[:, 0], wide.log_softmax(dim=1).gather(1, tokens)[:, 0].float()


class MixesUpThePairs(TorchOps):
    def rotary(self, q: Any, k: Any, positions: Any, cos_sin: Any, head_size: int, is_neox: bool) -> Any:
        return super().rotary(q, k, positions, cos_sin, head_size, is_neox=True)


class MasksEveryRow(MinTokens):
    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        logits[:, 2] = -torch.inf


class AlwaysThere(MinTokens):
    @classmethod
    def from_params(cls, params: Any, context: Any) -> Any:
        return super().from_params(replace(params, min_tokens=1), context)


class CallsItselfInvariant(Penalties):
    argmax_invariant: ClassVar[bool] = True


class RemembersTheLastOutput(Penalties):
    _seen: ClassVar[dict[int, int]] = {}

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        super().apply(logits, rows)
        for row in rows:
            logits[row.row, 0] += cls._seen.setdefault(row.sequence_id, len(row.output_token_ids))


class GivesMoreThanTheBudget(FCFS):
    def chunk(self, view: RequestView, budget: int) -> int:
        return view.num_prompt_tokens


class HasMixedKeys(FCFS):
    def key(self, view: RequestView) -> Any:
        return view.client_id or view.arrival_index


class IsNeverTheSame(FCFS):
    _calls = 0

    def key(self, view: RequestView) -> tuple[float, int]:
        IsNeverTheSame._calls += 1
        return (IsNeverTheSame._calls, 0)


class HasNoContext(Llama):
    @staticmethod
    def spec(hf_config: Mapping[str, Any]) -> ModelSpec:
        return replace(Llama.spec(hf_config), max_model_len=7)


class LooksAtOtherTokens(Llama):
    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        return super().forward(hidden + 0.01 * hidden.mean(dim=0), positions, attend)


class RemembersTheLastCall(Llama):
    _last = 0.0

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        out = super().forward(hidden + self._last, positions, attend)
        self._last = 0.01
        return out


class CountsForItself(Llama):
    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        return super().forward(hidden, torch.arange(len(positions)), attend)


class ReadsAnything(SafetensorsLoader):
    @classmethod
    def supports(cls, path: Path) -> tuple[str, ...]:
        return ()


class LetsErrorsThrough(SafetensorsLoader):
    @classmethod
    def tensors(cls, path: Path) -> Any:
        try:
            yield from super().tensors(path)
        except CheckpointError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class NoPort:
    host: str = option("localhost", "Where to listen.")


@dataclass(frozen=True)
class HidesTheModel(NoPort):
    port: int = option(8000, "Where to listen.")
    model: str = option("x", "A model.")


class FrontendWithoutPort:
    options = NoPort


class FrontendThatHidesTheModel:
    options = HidesTheModel


@click.command()
@click.option("--what")
def command_without_help(what: str) -> None:
    pass


FAULTS: list[tuple[str, Any, str]] = [
    ("attention_backends", ForgetsTheWindow, "window"),
    ("attention_backends", ForgetsTheSlopes, "alibi"),
    ("attention_backends", ForgetsTheSoftCap, "soft_cap"),
    ("attention_backends", TakesTheWrongScale, "decodes"),
    ("attention_backends", TakesTheWrongScale, "prompts"),
    ("attention_backends", KeepsTheFirstPlan, "plan_can_be_refilled"),
    ("attention_backends", CopiesOneAfterTheOther, "copy_blocks"),
    ("attention_backends", CopiesTheFirstLayerOnly, "copy_blocks"),
    ("attention_backends", SwapsTheFirstLayerOnly, "swap_blocks"),
    ("attention_backends", RefusesWithoutWords, "supports_gives_reasons"),
    ("op_providers", NormsInBfloat16, "rms_norm"),
    ("op_providers", NormsInBfloat16, "fused_add_rms_norm"),
    ("op_providers", ForgetsTheBias, "linear"),
    ("op_providers", OpensNoGate, "gated_linear"),
    ("op_providers", QuantisesTooMuch, "quantised_linear"),
    ("op_providers", MixesUpThePairs, "rotary"),
    ("op_providers", FindsTheLastPlace, "row_maxima"),
    ("op_providers", DrawsTheMostLikely, "draw_rows"),
    ("op_providers", ForgetsTheFilters, "draw_rows"),
    ("logits_processors", MasksEveryRow, "only_given_rows_change"),
    ("logits_processors", AlwaysThere, "default_params_do_not_use_it"),
    ("logits_processors", CallsItselfInvariant, "argmax_invariant_is_honest"),
    ("logits_processors", RemembersTheLastOutput, "state_is_rebuilt_from_token_ids"),
    ("schedulers", GivesMoreThanTheBudget, "chunk_is_within_the_budget"),
    ("schedulers", HasMixedKeys, "keys_are_comparable"),
    ("schedulers", IsNeverTheSame, "keys_are_stable"),
    ("models", HasNoContext, "spec_is_consistent"),
    ("models", LooksAtOtherTokens, "sequences_do_not_mix"),
    ("models", LooksAtOtherTokens, "chunks_equal_whole"),
    ("models", RemembersTheLastCall, "forward_is_a_pure_function"),
    ("models", CountsForItself, "positions_matter"),
    ("models", CountsForItself, "chunks_equal_whole"),
    ("weight_loaders", ReadsAnything, "empty_folder_is_refused"),
    ("weight_loaders", LetsErrorsThrough, "damage_is_a_checkpoint_error"),
    ("frontends", FrontendWithoutPort, "options_become_a_command_line"),
    ("frontends", FrontendThatHidesTheModel, "options_do_not_hide_the_engine"),
    ("commands", command_without_help, "help_explains_it"),
    ("commands", print, "is_a_click_command"),
]


@pytest.mark.parametrize(("group", "plugin", "check"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_check_finds_the_fault(group: str, plugin: Any, check: str) -> None:
    with pytest.raises(ConformanceFailure):
        checks_of(f"cacheflow.{group}")[check](plugin, "faulty")


@pytest.mark.parametrize(
    ("group", "plugin", "check"),
    [
        ("attention_backends", TorchAttention, "copy_blocks"),
        ("models", Llama, "sequences_do_not_mix"),
        ("schedulers", FCFS, "keys_are_stable"),
        ("logits_processors", Penalties, "state_is_rebuilt_from_token_ids"),
    ],
)
def test_the_check_passes_without_the_fault(group: str, plugin: Any, check: str) -> None:
    checks_of(f"cacheflow.{group}")[check](plugin, "sound")
