"""`Runner`: owns a rank's weights and KV tensors and runs steps on them.

On a GPU a step is launched, and its result waited for later; a step of decodes is one CUDA graph. It knows no requests, queues
or policies: a step says everything. Where it runs, and how results travel, is the executor's.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from cacheflow.errors import ConfigError, EngineDeadError, NotEnoughMemoryError
from cacheflow.interfaces import Capacity, KVCacheSpec, OpSpec, SampleSpec, StepOutput
from cacheflow.kvcache.plan import available_memory_bytes, bytes_per_block, cpu_budget_bytes, num_usable_cpus, plan_blocks
from cacheflow.layers.decoder import StepAttention
from cacheflow.loading.dtype import choose_dtype
from cacheflow.loading.model import load_model
from cacheflow.loading.resolve import resolve_model, tokenizer_data
from cacheflow.plugins import select_plugin
from cacheflow.profile import Spans, TimedOps, no_span
from cacheflow.sampling import device_sampler
from cacheflow.sampling.logprobs import score_tokens
from cacheflow.sampling.sampler import Sampler
from cacheflow.types import ModelInfo, SamplingParams
from cacheflow.worker import pages
from cacheflow.worker.allocator import keep_freed_memory
from cacheflow.worker.batch import lay_out, upload
from cacheflow.worker.graphs import DecodeGraphs, capture_cuda_graphs, num_spare_slots
from cacheflow.worker.processor_context import TokenizerContext

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cacheflow.config import EngineConfig
    from cacheflow.interfaces import Architecture, AttentionBackend, ModelSpec, Sample, Step
    from cacheflow.types import Logprobs
    from cacheflow.worker.batch import ModelInput
    from cacheflow.worker.graphs import Capture

logger = logging.getLogger(__name__)

_DEAREST_CHOICE = SampleSpec(
    sequence_id=-1,
    request_index=-1,
    index=0,
    params=SamplingParams(top_p=0.9, presence_penalty=0.1, seed=0),
    prompt_token_ids=[0],
    output_token_ids=[0],
)
"""What takes most memory to choose: sorted, and from changed logits."""


class Runner:
    """A loaded model with its KV cache.

    Args:
        config: The engine's options.
        capture: How a step of decodes is recorded, to be repeated; None: as a CUDA graph where that can be, else not at all.

    Attributes:
        capacity: What it offers.

    Raises:
        CacheflowError: The model can't be found or loaded, an option doesn't hold, or the KV cache finds no room.
    """

    def __init__(self, config: EngineConfig, capture: Capture | None = None) -> None:
        device = choose_device(config.device)
        if config.num_threads or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(config.num_threads or num_usable_cpus())
        files = resolve_model(config)
        dtype = choose_dtype(config.dtype, files.hf_config, device)
        ops: Any = select_plugin("cacheflow.op_providers", config.op_provider, OpSpec(dtype=dtype, device=device))[1]
        self._spans = Spans() if config.profile or config.trace is not None else None
        provider: Any = ops(OpSpec(dtype=dtype, device=device))
        timed: Any = provider if self._spans is None else TimedOps(provider, self._spans)
        loaded = load_model(files, dtype, device, timed, quantization=config.quantization)
        max_model_len = choose_max_model_len(config.max_model_len, loaded.spec)
        tokenizer = tokenizer_data(files, config)
        kv_spec = KVCacheSpec(
            attention=loaded.spec.attention,
            num_heads=loaded.spec.num_heads,
            num_kv_heads=loaded.spec.num_kv_heads,
            head_size=loaded.spec.head_size,
            block_size=config.block_size,
            dtype=dtype,
            device=device,
        )
        backend: Any = select_plugin("cacheflow.attention_backends", config.attention_backend, kv_spec)[1]

        self._device = device
        self._block_size = config.block_size
        self._model: Architecture = loaded.model
        self._spec = loaded.spec
        self._backend: AttentionBackend = backend(kv_spec)
        self._span = no_span if self._spans is None else self._spans.span
        attention: Callable[..., torch.Tensor] = self._backend.forward
        self._attend = attention if self._spans is None else self._spans.timed("forward: attention", attention)
        context = TokenizerContext(tokenizer, loaded.spec.vocab_size)
        self._sampler = Sampler(context, getattr(provider, "row_maxima", None), getattr(provider, "draw_rows", None))
        self._runs_ahead = config.run_ahead == "always" or (config.run_ahead == "auto" and device.type == "cuda")
        self._chooses_on_device = self._runs_ahead or device.type == "cuda"
        self._chosen: tuple[torch.Tensor, tuple[SampleSpec, ...]] | None = None
        if capture is None and device.type == "cuda" and not config.enforce_eager:
            capture = capture_cuda_graphs() if getattr(self._backend, "can_be_captured", False) else None
        # Of its own, for the padding of captured steps: no request is told of these blocks.
        num_spare_blocks = 0 if capture is None else -(-num_spare_slots(config.max_num_seqs) // config.block_size)
        num_blocks = self._plan_blocks(config, max_model_len, dtype)
        shape = self._backend.kv_shape(num_blocks + num_spare_blocks)
        if device.type == "cpu":
            self._kv = [pages.zeros(shape, dtype) for _ in loaded.spec.attention]
            pages.take_first(self._kv)
        else:
            self._kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in loaded.spec.attention]
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            self._graphs = DecodeGraphs(
                self._model_forward,
                self._backend,
                capture,
                max_num_seqs=config.max_num_seqs,
                max_num_blocks=-(-max_model_len // config.block_size),
                block_size=config.block_size,
                spare_block=num_blocks,
                hidden_size=loaded.spec.hidden_size,
                dtype=dtype,
                device=device,
            )
        if device.type == "cpu":
            keep_freed_memory()
        info = ModelInfo(
            model=config.model,
            architecture=loaded.architecture,
            dtype=str(dtype).removeprefix("torch."),
            vocab_size=loaded.spec.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            tokenizer=tokenizer,
            engine_version=version("cacheflow-engine"),
        )
        self.capacity = Capacity(num_blocks=num_blocks, spec=loaded.spec, info=info)

    def execute(self, step: Step) -> StepOutput:
        """Runs a step to its end."""
        return self.launch(step).result()

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Copies blocks, computes the step's tokens, scores and samples.

        A GPU is told all that, and may not have begun when this returns; only prompt log probabilities, pooled states and the
        candidates of beams are waited for.
        """
        self._sampler.forget(step.finished_requests)
        if step.copies:
            with self._span("copy blocks"):
                self._backend.copy_blocks(self._kv, step.copies)
        samples: list[list[Sample]] = [[] for _ in step.sequences]
        prompt_logprobs: list[list[Logprobs] | None] = [None] * len(step.sequences)
        if not step.sequences:
            return Launched(StepOutput(samples=samples, prompt_logprobs=prompt_logprobs))
        with self._span("input"):
            chosen, chosen_rows = None, None
            if step.follows:
                assert self._chosen is not None
                chosen, specs = self._chosen
                chosen_rows = {spec.sequence_id: row for row, spec in enumerate(specs)}
            laid_out = lay_out(step, self._block_size, chosen_rows)
            padded = self._graphs.pad(laid_out) if self._graphs is not None else None
            batch = upload(padded or laid_out, self._device, chosen)
        with self._span("forward"):
            if padded is not None and self._graphs is not None:
                hidden = self._graphs.run(batch)
            else:
                hidden = self._model_forward(batch.input_ids, batch.positions, self._backend.plan(batch.attention))
        for part in batch.scored:
            rows = hidden[part.start : part.start + len(part.token_ids)]
            prompt_logprobs[part.index] = score_tokens(
                self._model.logits, rows, part.token_ids, self._spec.vocab_size, part.count
            )
        choices: device_sampler.Choices | None = None
        if batch.specs:
            with self._span("logits"):
                # Of a step of decodes all rows are sampled, and in this order.
                is_all = len(batch.logits_rows) == len(hidden)
                logits = self._model.logits(hidden if is_all else hidden.index_select(0, batch.logits_rows))
            with self._span("sample"):
                if self._chooses_on_device:
                    choices = device_sampler.choose(self._sampler, logits, batch.row_of_spec, batch.specs)
                    self._chosen = choices.token_ids, batch.specs
                else:
                    _give_out(self._sampler.sample(logits, batch.row_of_spec, batch.specs), batch, samples)
        pooled = {index: hidden[start:end].double().sum(dim=0).tolist() for index, start, end in batch.pooled}
        spans = () if self._spans is None else self._spans.take()
        output = StepOutput(samples=samples, prompt_logprobs=prompt_logprobs, pooled=pooled, spans=spans)
        return Launched(output, choices, batch)

    def can_follow(self, step: Step) -> bool:
        """Whether the step behind this one can be launched before its tokens are known: processors may have to see them."""
        return self._runs_ahead and not any(
            self._sampler.is_processed(spec) for part in step.sequences for spec in part.samples
        )

    def check(self) -> None:
        """Raises `EngineDeadError` if the device does not answer any more: a fault of CUDA stays until the process ends."""
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as error:
                raise EngineDeadError(f"The GPU does not answer any more: {error}") from error

    def _model_forward(self, input_ids: torch.Tensor, positions: torch.Tensor, plan: Any) -> torch.Tensor:
        """Hidden states of all rows, `[num_tokens, hidden_size]`."""
        attend = StepAttention(self._attend, self._spec.attention, self._kv, plan, self._spec.head_size)
        return self._model.forward(self._model.embed(input_ids), positions, attend)

    def _plan_blocks(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> int:
        if self._device.type == "cuda":
            budget = available = self._free_cuda_bytes(config)
        else:
            available = available_memory_bytes()
            budget = cpu_budget_bytes(config.kv_cache_memory, config.swap_space, available)
        return plan_blocks(
            budget_bytes=budget,
            available_bytes=available,
            block_bytes=bytes_per_block(self._backend.kv_shape(1), self._spec.num_layers, dtype.itemsize),
            block_size=config.block_size,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
        )

    @torch.inference_mode()
    def _free_cuda_bytes(self, config: EngineConfig) -> int:
        """What the largest step leaves of the GPU's share, found by running one without a cache."""
        torch.cuda.reset_peak_memory_stats(self._device)
        num_tokens = min(config.max_num_batched_tokens, self._spec.max_model_len)
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
        try:
            hidden = self._model.forward(self._model.embed(tokens), tokens, lambda layer, q, k, v: q)
            logits = self._model.logits(hidden[: config.max_num_seqs])
            device_sampler.choose(self._sampler, logits, range(len(logits)), [_DEAREST_CHOICE] * len(logits))
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemoryError(
                f"A step of {num_tokens} tokens finds no room beside the weights ({error}). Lower --max-num-batched-tokens."
            ) from error
        self._sampler.forget((_DEAREST_CHOICE.request_index,))
        activations = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return max(0, int(free - (1 - config.gpu_memory_utilization) * total) - activations)


class Launched:
    """A step on its way.

    Args:
        output: All of it but what is still being chosen.
        choices: That, or None.
        batch: The step's, where there are choices.
    """

    def __init__(
        self, output: StepOutput, choices: device_sampler.Choices | None = None, batch: ModelInput | None = None
    ) -> None:
        self._output, self._choices, self._batch = output, choices, batch

    def result(self) -> StepOutput:
        """Waits for the device, the only time in a step, and reads what it chose.

        Raises:
            InvalidRequestError: A request allows no token at all.
            RequestFailedError: The model's logits are not numbers.
        """
        if self._choices is not None and self._batch is not None:
            _give_out(self._choices.samples(), self._batch, self._output.samples)
            self._choices = None
        return self._output


def _give_out(chosen: Sequence[Sample], batch: ModelInput, samples: list[list[Sample]]) -> None:
    """Each sample to its sequence's place in the step."""
    for owner, sample in zip(batch.spec_owner, chosen, strict=True):
        samples[owner].append(sample)


def choose_device(requested: str) -> torch.device:
    """The device that an option names; "auto" is a GPU where there is one.

    Raises:
        ConfigError: A GPU is asked for, and torch sees none.
    """
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise ConfigError(f"--device cuda: torch {torch.__version__} sees no GPU. Use --device cpu, or install a CUDA build.")
    return torch.device("cuda" if requested in ("auto", "cuda") and has_cuda else "cpu")


def choose_max_model_len(requested: int | None, spec: ModelSpec) -> int:
    """The option, or the model's own.

    Raises:
        ConfigError: More than the model was made for.
    """
    if requested is not None and requested > spec.max_model_len:
        raise ConfigError(
            f"--max-model-len {requested} is more than the {spec.max_model_len} tokens that the model was made for. "
            f"Leave it out, or choose at most {spec.max_model_len}."
        )
    return requested or spec.max_model_len
