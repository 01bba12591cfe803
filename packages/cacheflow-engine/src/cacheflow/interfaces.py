"""The seams: what each plugin group's members must offer, and the frozen data they exchange with the engine.

Every interface is a `Protocol`: a plugin satisfies it by its shape and needs to inherit nothing. `supports(...)` always
answers with the tuple of *reasons why not*; an empty one means yes. This module imports torch for type checking only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from cacheflow.types import Logprobs, ModelInfo, SamplingParams, TokenizerData

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from cacheflow.config import EngineConfig
    from cacheflow.layers import BuildContext

CONTRACT_VERSION = 1
"""The version of all interfaces on this page. A plugin that declares another one is refused with a sentence saying so."""

T = TypeVar("T", covariant=True)


# --- Models: group cacheflow.models ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What is particular to one layer's attention.

    Attributes:
        layer: Its number in the whole model, from 0.
        scale: Factor of q · k.
        window: Each position sees itself and the `window - 1` before it; None: all before it.
        alibi_slopes: One per query head (ALiBi, arXiv:2108.12409), or None.
        soft_cap: Scores become `soft_cap * tanh(score / soft_cap)`, or None.
    """

    layer: int
    scale: float
    window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The numbers of a model that the engine plans with.

    Attributes:
        attention: One entry per layer.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_size: Elements of one head.
        hidden_size: Elements of one token's hidden state.
        vocab_size: Rows of the logits.
        max_model_len: Longest context the model was made for, in tokens.
    """

    attention: tuple[AttentionSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_model_len: int

    @property
    def num_layers(self) -> int:
        """Layers in the whole model."""
        return len(self.attention)


class Attend(Protocol):
    """How a model reaches the KV cache: it hides blocks, batches and backends."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores this step's keys and values, then attends causally within each sequence.

        Args:
            layer: Its number in the whole model.
            q: `[num_tokens, num_heads * head_size]`; as k and v overwritten once the next layer begins.
            k: `[num_tokens, num_kv_heads * head_size]`.
            v: Like `k`.

        Returns:
            `[num_tokens, num_heads * head_size]`, in `q`'s dtype.
        """
        ...


class Architecture(Protocol):
    """A model class. Its entry-point name is the architecture's name in a Hugging Face configuration.

    A model is a function of its arguments: it keeps no state between calls and knows neither batches nor blocks. Its
    constructor declares every parameter through the `BuildContext`, with its names in a checkpoint.

    A class may have `TINY`, a small Hugging Face configuration: `cacheflow plugins check` builds it and tries the model.
    """

    CONTRACT_VERSION: ClassVar[int]

    @staticmethod
    def spec(hf_config: Mapping[str, Any]) -> ModelSpec:
        """Reads the numbers from a Hugging Face `config.json`.

        Raises:
            UnsupportedModelError: A setting that this class does not implement.
        """
        ...

    def __init__(self, hf_config: Mapping[str, Any], context: BuildContext) -> None: ...

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens] int64` → `[num_tokens, hidden_size]`."""
        ...

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """All layers and the final norm: `[num_tokens, hidden_size]`, positions `[num_tokens] int64`, to the same shape.

        `hidden` may be overwritten.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` → `[num_rows, vocab_size]`."""
        ...


# --- Weight loaders: group cacheflow.weight_loaders -----------------------------------------------------------------


class WeightLoader(Protocol):
    """Reads one form of checkpoint. It never runs code that a checkpoint carries."""

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]
    """Of several that support a path, `auto` takes the one with the highest."""

    @classmethod
    def supports(cls, path: Path) -> tuple[str, ...]:
        """Why `path` (a folder, or one file) can't be read by this loader. Cheap: it opens no weights."""
        ...

    @classmethod
    def config(cls, path: Path) -> dict[str, Any]:
        """The checkpoint's configuration in the form of a Hugging Face `config.json`.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        ...

    @classmethod
    def tokenizer(cls, path: Path) -> TokenizerData:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        ...

    @classmethod
    def tensors(cls, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors under their Hugging Face names, on the CPU, each usable until the next one is asked for.

        Raises:
            CheckpointError: A file is truncated, corrupt or hostile.
        """
        ...


# --- Attention backends: group cacheflow.attention_backends ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What an attention backend is asked to support and to lay out.

    Attributes:
        attention: One entry per layer that this rank owns.
        num_heads: Query heads of this rank.
        num_kv_heads: Key and value heads of this rank.
        head_size: Elements of one head.
        block_size: Token slots of one block.
        dtype: Of keys and values.
        device: Where they live.
    """

    attention: tuple[AttentionSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The shape of one step's batch. Sequences with one query token come first.

    Attributes:
        query_start_loc: `[num_seqs + 1] int32`: sequence i's query tokens are the rows from `query_start_loc[i]` up to
            `query_start_loc[i + 1]`.
        seq_lens: `[num_seqs] int32`: tokens in the cache once this step is stored, its query tokens included.
        block_tables: `[num_seqs, max_num_blocks] int32`: token t of a sequence lies in block `block_tables[i, t // block_size]`
            at slot `t % block_size`; unused entries are -1.
        slot_mapping: `[num_tokens] int64`: `block * block_size + slot` where each query token is stored; all distinct.
        num_decodes: How many of the first sequences have exactly one query token.
        max_query_len: Most query tokens of one sequence.
        max_seq_len: Most tokens of one sequence.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int


class AttentionBackend(Protocol):
    """Paged attention over a KV cache whose layout it owns. One instance serves all layers of a rank.

    The runner makes one tensor of `kv_shape` per layer, calls `copy_blocks` for the step's copies, then `plan` once and
    `forward` once a layer.

    A backend may have `can_be_captured = True`. It promises that `plan` refills `into`, that `forward` reads nothing back from
    the device, and that what it launches for decodes depends on shapes alone: then steps of decodes are captured in CUDA
    graphs, each for its number of sequences and width of block tables.
    """

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]
    """Of several that support a spec, `auto` takes the one with the highest."""

    @classmethod
    def supports(cls, spec: KVCacheSpec) -> tuple[str, ...]:
        """Why this backend can't serve `spec` on this machine."""
        ...

    def __init__(self, spec: KVCacheSpec) -> None: ...

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of one layer's cache tensor, of the spec's dtype, holding keys and values of `num_blocks` blocks."""
        ...

    def plan(self, metadata: AttentionMetadata, into: Any = None) -> Any:
        """Whatever `forward` wants to have prepared once per step.

        Args:
            metadata: This step's batch.
            into: An earlier plan for a batch of the same shape, whose tensors are to be refilled (CUDA graphs).
        """
        ...

    def forward(
        self, layer: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, plan: Any
    ) -> torch.Tensor:
        """Stores k and v at their slots, then attends causally.

        Args:
            layer: The layer's particulars.
            q: `[num_tokens, num_heads, head_size]`, contiguous in the last axis.
            k: `[num_tokens, num_kv_heads, head_size]`, contiguous in the last axis.
            v: Like `k`.
            kv: The layer's cache tensor; written in place.
            plan: What `plan` made of this step.

        Returns:
            `[num_tokens, num_heads, head_size]` in q's dtype.
        """
        ...

    def copy_blocks(self, kv: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) in every layer, as if all sources were read before any write."""
        ...

    def swap_blocks(
        self, source: Sequence[torch.Tensor], destination: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies whole blocks from one set of cache tensors to another, which may live on another device."""
        ...


# --- Op providers: group cacheflow.op_providers ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Where and in which dtype the operations of a model will run."""

    dtype: torch.dtype
    device: torch.device


LINEAR_FORMS = ("plain", "int8", "int4", "int8_dynamic")
"""How `OpProvider.linear` keeps a weight: in the spec's dtype; as integers of 8 bits, or of 4 with a minimum, with a float16
scale for each `QUANTISATION_GROUP` inputs of an output; as bytes with one scale for each output, to be multiplied by rows that
are themselves rounded to bytes, each with a scale of its own."""

QUANTISATION_GROUP = 32
"""Inputs that share a scale in the forms "int8" and "int4": GGUF's Q8_0, Q4_0 and Q4_1 have the same. A last group may be
shorter."""


class OpProvider(Protocol):
    """The operations between attention calls. Inputs are contiguous in the last axis; outputs are new tensors unless said.

    A provider may have three methods more: `decoder`, which runs all layers of a Llama-shaped model (see `layers.decoder`),
    `row_maxima`, which greedy sampling asks (see `sampling.sampler.row_maxima`), and `draw_rows`, which random sampling asks
    (see `sampling.sampler.DrawRows`).
    """

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]

    @classmethod
    def supports(cls, spec: OpSpec) -> tuple[str, ...]:
        """Why this provider can't serve `spec` on this machine."""
        ...

    def __init__(self, spec: OpSpec) -> None: ...

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, form: str = "plain", is_gated: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Packs `weight [out_features, in_features]`, once, and keeps only what it packed.

        Args:
            weight: In the spec's dtype; in other forms than "plain" any floating-point dtype.
            bias: `[out_features]` in the spec's dtype, or None.
            form: One of `LINEAR_FORMS`. A provider without a fast way takes a slow one.
            is_gated: The first half of the outputs are gates, the second half what they let through, and the result is
                `silu(first half) * second half`; what is rounded in between is the provider's choice.

        Returns:
            A function from `[num_rows, in_features]` to `[num_rows, out_features]`, gated half as many, in the spec's dtype.
        """
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm (arXiv:1910.07467) over the last axis: computed in float32, rounded to x's dtype, then times the weight.

        Where it rounds decides bfloat16 tokens: models are trained and published with this order.
        """
        ...

    def fused_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(rms_norm(x + residual), x + residual)`; either input may be overwritten."""
        ...

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """LayerNorm over the last axis."""
        ...

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, head_size: int, is_neox: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary position embedding (arXiv:2104.09864); q and k may be overwritten.

        Cosines and sines are rounded to q's dtype, and the products are taken in it.

        Args:
            q: `[num_tokens, num_heads * head_size]`, rows may be strided.
            k: `[num_tokens, num_kv_heads * head_size]`, rows may be strided.
            positions: `[num_tokens] int64`.
            cos_sin: `[max_positions, rotary_size] float32`: cosines in the first half, sines in the second.
            head_size: Elements of one head; the first `rotary_size` of them turn.
            is_neox: Pairs are (i, i + rotary_size / 2); otherwise (2i, 2i + 1).
        """
        ...

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, 2 * size]` → `silu(x[:, :size]) * x[:, size:]`."""
        ...


# --- Logits processors: group cacheflow.logits_processors -----------------------------------------------------------


class ProcessorContext(Protocol):
    """What a processor may ask about the model. The tokenizer is loaded on first use, and only then."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def special_token_ids(self) -> frozenset[int]:
        """Ids that steer the model rather than being text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token id stands for."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorRow:
    """One row of logits that a processor is to change.

    Attributes:
        row: Its number in the logits.
        processor: What `from_params` made for the row's request.
        sequence_id: Unique in the engine's life: a key for state, which must be rebuildable from the token ids.
        prompt_token_ids: Of the request.
        output_token_ids: Generated so far.
    """

    row: int
    processor: Any
    sequence_id: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


class LogitsProcessor(Protocol):
    """Changes logits before a token is chosen. Processors run in the order of `priority`, highest first.

    A class may have `supports(config)`, the reasons why it can't be used here, for `cacheflow plugins`, and
    `EXAMPLES`, keyword arguments of `SamplingParams` that switch it on, for `cacheflow plugins check`.
    """

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]
    argmax_invariant: ClassVar[bool]
    """It never changes which token is the most likely one, so greedy rows skip it."""

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """An instance for one request, or None when the request does not use this processor.

        Raises:
            InvalidRequestError: The parameters can't be honoured.
        """
        ...

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Changes `logits [num_rows, vocab_size] float32` in place, in the given rows only."""
        ...


# --- Scheduling policies: group cacheflow.schedulers ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestView:
    """What a policy sees of a request.

    Attributes:
        request_id: The client's name for it.
        client_id: Who asked.
        priority: Smaller is sooner.
        arrival_s: Seconds since the epoch.
        arrival_index: Counts the engine's requests; unique, later is larger.
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Generated so far, over all sequences.
        num_sequences: Sequences it runs.
    """

    request_id: str
    client_id: str
    priority: int
    arrival_s: float
    arrival_index: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_sequences: int


class SchedulingPolicy(Protocol):
    """Chooses; admission, blocks and budget stay in the scheduler, so a policy can't corrupt them."""

    CONTRACT_VERSION: ClassVar[int]

    def key(self, view: RequestView) -> Any:
        """Computed once, on arrival: requests are served in ascending order. Keys must be comparable with one another."""
        ...

    def victim_key(self, view: RequestView) -> Any:
        """Of the running requests that could lose their blocks, the one with the largest does."""
        ...

    def chunk(self, view: RequestView, budget: int) -> int:
        """How many prompt tokens the request may compute in this step: 1 to `budget`."""
        ...


# --- Executors: group cacheflow.executors ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a started executor offers.

    Attributes:
        num_blocks: KV blocks.
        spec: The model's numbers.
        info: What clients need to know.
    """

    num_blocks: int
    spec: ModelSpec
    info: ModelInfo


UNKNOWN_TOKEN = -1
"""Stands for a token that the running step is about to choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSpec:
    """One choice to make from the logits behind a sequence's last scheduled token.

    Attributes:
        sequence_id: Unique in the engine's life.
        request_index: The request's `arrival_index`: processors are made once per request.
        index: The sequence's number within its request; the second coordinate of its random numbers.
        params: Of the request.
        prompt_token_ids: Of the request.
        output_token_ids: Generated so far.
        num_candidates: 0: choose one token. Otherwise return this many most likely ones (beam search).
        num_unknown: Tokens that precede this one and are not in `output_token_ids` yet: 1 in a step that follows another.
    """

    sequence_id: int
    request_index: int
    index: int
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    num_candidates: int = 0
    num_unknown: int = 0

    @property
    def position(self) -> int:
        """Tokens generated before this one: the third coordinate of its random number."""
        return len(self.output_token_ids) + self.num_unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledSequence:
    """One sequence's part of a step.

    Attributes:
        sequence_id: Unique in the engine's life.
        token_ids: The tokens to compute, at least one.
        num_computed_tokens: How many come before them in the cache.
        block_table: Blocks for all of them.
        samples: The choices to make behind the last token; empty within a prompt, several where sequences are about to fork.
        num_prompt_logprobs: How many top log probabilities to give beside each of `scored_token_ids`; None: no scores.
        scored_token_ids: The tokens that follow the scheduled ones in the prompt; the scored positions are the first
            `len(scored_token_ids)` scheduled ones.
        pooling: What is wanted of the scheduled tokens' last hidden states: their sum ("mean": the scheduler divides), the last
            one, or nothing.
    """

    sequence_id: int
    token_ids: Sequence[int]
    num_computed_tokens: int
    block_table: Sequence[int]
    samples: tuple[SampleSpec, ...] = ()
    num_prompt_logprobs: int | None = None
    scored_token_ids: Sequence[int] = ()
    pooling: Literal["mean", "last"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One pass of the model: `{sequence: tokens}`. There is no prefill mode.

    Attributes:
        sequences: In any order.
        copies: Blocks (source, destination) to copy before anything is written.
        finished_requests: `request_index` of requests that ended since the last step, whose processors can be dropped.
        follows: It was made while the step before ran, whose sequences include all of its own: they compute the one token that
            is chosen for them there. Here that token is `UNKNOWN_TOKEN`.
    """

    sequences: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()
    finished_requests: tuple[int, ...] = ()
    follows: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was chosen for one `SampleSpec`.

    Attributes:
        token_ids: One token; or the candidates, best first.
        scores: One per token: its log probability after processors (what beam search adds up); in nats.
        logprobs: One per token: its raw log probability, in nats.
        top_logprobs: One per token, when `params.logprobs` asks for it: that token first, then the most likely ones.
    """

    token_ids: list[int]
    scores: list[float]
    logprobs: list[float]
    top_logprobs: list[Logprobs] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What a step gave.

    Attributes:
        samples: One list per scheduled sequence, in the step's order, with one entry per `SampleSpec`.
        prompt_logprobs: Likewise: entries for `scored_token_ids`, or None.
        pooled: `hidden_size` numbers for each scheduled sequence with a `pooling`, by its place in the step.
        spans: Where the worker's time went, if that is recorded: name, start and duration in ns of the monotonic clock.
    """

    samples: list[list[Sample]]
    prompt_logprobs: list[list[Logprobs] | None]
    pooled: Mapping[int, list[float]] = field(default_factory=dict)
    spans: tuple[tuple[str, int, int], ...] = ()


class Pending(Protocol[T]):
    """A result on its way."""

    def result(self) -> T:
        """Waits for it; raises what the work raised."""
        ...


class Executor(Protocol):
    """Runs steps on one or several workers. Steps run in the order in which they are submitted.

    An executor may have `can_follow(step) -> bool`: whether it takes a step that `follows` the given one, which was submitted
    last, before that one's result is asked for. What the lists in a step hold counts when it is submitted: they grow later. No
    more than two steps are on their way. When the first one fails, the second one's result is asked for too, and means nothing.
    """

    CONTRACT_VERSION: ClassVar[int]

    @classmethod
    def supports(cls, config: EngineConfig) -> tuple[str, ...]:
        """Why this executor can't run `config`."""
        ...

    def start(self, config: EngineConfig) -> Capacity:
        """Loads the model and makes the KV cache.

        Raises:
            CacheflowError: It can't, with the reason.
        """
        ...

    def submit(self, step: Step) -> Pending[StepOutput]:
        """Starts a step. If it fails, nothing of it counts; after an `OutOfMemoryError` the next ones are smaller."""
        ...

    def check(self) -> None:
        """Raises `EngineDeadError` if a worker is gone."""
        ...

    def close(self) -> None:
        """Frees everything. May be called twice."""
        ...


# --- Frontends: group cacheflow.frontends ---------------------------------------------------------------------------


class Frontend(Protocol):
    """An HTTP service over an engine, as an ASGI application. It sees token ids and text, never the scheduler or a model.

    `options` is a frozen dataclass of `cacheflow.config.option` fields; it has at least `host` and `port`.
    """

    CONTRACT_VERSION: ClassVar[int]
    options: ClassVar[type[Any]]

    @staticmethod
    def create_app(engine: Any, options: Any) -> Any:
        """The ASGI application.

        Args:
            engine: A started `cacheflow.AsyncLLMServer`; the launcher closes it.
            options: An instance of `options`.
        """
        ...
