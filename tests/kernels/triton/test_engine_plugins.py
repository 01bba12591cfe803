"""The Triton backend and op provider under the engine's own conformance suites, and what those don't ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cacheflow import LLM, SamplingParams
from cacheflow.config import EngineConfig
from cacheflow.conformance import NotApplicable, checks_of
from cacheflow.core import EngineCore
from cacheflow.executors.local import LocalExecutor
from cacheflow.interfaces import AttentionMetadata, AttentionSpec, Capacity, KVCacheSpec
from cacheflow.types import EngineRequest
from cacheflow.worker.runner import Runner
from cacheflow_kernels.attention import TritonAttention
from cacheflow_kernels.providers import TritonOps
from cacheflow_kernels.triton import is_interpreted

DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
SPEC = KVCacheSpec(
    attention=(AttentionSpec(layer=0, scale=0.2),),
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    block_size=16,
    dtype=torch.float16,
    device=DEVICE,
)
SLOW_CHECKS = {"shapes", "window"} if is_interpreted() else set()
"""Half a minute in the interpreter, for what the cases of test_kernels.py cover as well."""


@pytest.mark.parametrize("check", [check for check in checks_of("cacheflow.attention_backends") if check not in SLOW_CHECKS])
def test_the_backend_conforms(check: str) -> None:
    checks_of("cacheflow.attention_backends")[check](TritonAttention, "triton")


@pytest.mark.parametrize("check", checks_of("cacheflow.op_providers"))
def test_the_op_provider_conforms(check: str) -> None:
    try:
        checks_of("cacheflow.op_providers")[check](TritonOps, "triton")
    except NotApplicable as reason:
        pytest.skip(str(reason))


def decodes(lens: list[int]) -> AttentionMetadata:
    """A batch of decodes whose blocks follow one another."""
    width = max(4, -(-max(lens) // 16))
    return AttentionMetadata(
        query_start_loc=torch.arange(len(lens) + 1, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        block_tables=torch.arange(width * len(lens), dtype=torch.int32, device=DEVICE).view(-1, width),
        slot_mapping=torch.tensor([16 * width * i + length - 1 for i, length in enumerate(lens)], device=DEVICE),
        num_decodes=len(lens),
        max_query_len=1,
        max_seq_len=max(lens),
    )


def test_a_refilled_plan_keeps_its_tensors_and_serves_the_new_batch() -> None:
    backend = TritonAttention(SPEC)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 32, generator=generator).half().to(DEVICE) for heads in (4, 2, 2))
    kv = torch.randn(backend.kv_shape(8), generator=generator).half().to(DEVICE)
    expected = backend.forward(SPEC.attention[0], q, k, v, kv.clone(), backend.plan(decodes([20, 33])))
    plan = backend.plan(decodes([50, 1]))
    addresses = [tensor.data_ptr() for tensor in (plan.query_start_loc, plan.seq_lens, plan.block_tables, plan.slot_mapping)]
    refilled = backend.plan(decodes([20, 33]), into=plan)
    after = [getattr(refilled, name) for name in ("query_start_loc", "seq_lens", "block_tables", "slot_mapping")]
    assert [tensor.data_ptr() for tensor in after] == addresses
    assert torch.equal(backend.forward(SPEC.attention[0], q, k, v, kv, refilled), expected)


@pytest.mark.parametrize(
    "batch",
    [decodes([20]), decodes([20, 80]), replace(decodes([3, 4]), max_query_len=2)],
    ids=["fewer sequences", "more blocks", "a chunk"],
)
def test_a_batch_that_the_planned_launches_do_not_cover_is_refused(batch: AttentionMetadata) -> None:
    backend = TritonAttention(SPEC)
    with pytest.raises(ValueError, match="can't refill a plan"):
        backend.plan(batch, into=backend.plan(decodes([50, 1])))


def test_a_head_that_fits_no_tile_is_a_reason_why_not() -> None:
    assert TritonAttention.supports(replace(SPEC, head_size=320)) == ("head size 320 is above 256",)


def test_the_engine_generates_the_same_tokens_as_with_torch(tiny_llama: Path) -> None:
    generated = []
    for name in ("torch", "triton"):
        llm = LLM(str(tiny_llama), dtype="float32", attention_backend=name, op_provider=name)
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        outputs = llm.generate(prompt_token_ids=[[5, 6, 7, 8] * 6, [9, 3]], sampling_params=params, use_tqdm=False)
        generated.append([output.outputs[0].token_ids for output in outputs])
        llm.close()
    assert len(generated[0][0]) == 6
    assert generated[0] == generated[1]


class CapturingExecutor(LocalExecutor):
    """The local executor, whose captured steps are called again on the same tensors."""

    def start(self, config: EngineConfig) -> Capacity:
        self._runner = Runner(config, capture=lambda run: run)
        return self._runner.capacity


def test_captured_steps_give_the_same_tokens(tiny_llama: Path) -> None:
    options = {"dtype": "float32", "attention_backend": "triton", "kv_cache_memory": 0.01}
    config = EngineConfig(model=str(tiny_llama), max_num_seqs=4, max_model_len=64, **options)
    generated = []
    for executor in (LocalExecutor(), CapturingExecutor()):
        core, tokens = EngineCore(config, executor), {}
        for i in range(3):
            params = SamplingParams(temperature=0.0, max_tokens=3 + i, ignore_eos=True)
            core.add(EngineRequest(request_id=str(i), prompt_token_ids=[5 + i] * (2 + 9 * i), params=params, arrival_s=0.0))
        while core.has_unfinished:
            for update in core.step():
                tokens.setdefault(update.request_id, []).extend(update.sequences[0].new_token_ids)
        generated.append(tokens)
    assert generated[0] == generated[1]
    assert [len(tokens) for tokens in generated[0].values()] == [3, 4, 5]
