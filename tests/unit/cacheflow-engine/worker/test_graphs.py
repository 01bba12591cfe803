"""Captured decode steps: their shapes, their padding, and that a step gives what it gives without them.

Where there is no GPU a step is not recorded but called again, on the same buffers: all but the recording is the real thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheflow.attention.torch_backend import TorchAttention
from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.executors.local import LocalExecutor
from cacheflow.interfaces import AttentionSpec, Capacity, KVCacheSpec, ScheduledSequence, Step
from cacheflow.types import EngineRequest, SamplingParams
from cacheflow.worker.batch import lay_out, pad_decodes, upload
from cacheflow.worker.graphs import LEAST_CONTEXT, Run, captured_sizes, num_spare_slots
from cacheflow.worker.runner import Runner

CPU = torch.device("cpu")


class Recorder:
    """Stands where CUDA graphs are made: it calls again what it was given.

    Attributes:
        num_captured: Shapes that were recorded.
        num_repeated: Calls of what it returned.
    """

    def __init__(self) -> None:
        self.num_captured = self.num_repeated = 0

    def __call__(self, run: Run) -> Run:
        self.num_captured += 1

        def again() -> None:
            self.num_repeated += 1
            run()

        return again


class CapturingExecutor(LocalExecutor):
    """The local executor with a given way to capture."""

    def __init__(self, capture: Callable[[Run], Run]) -> None:
        super().__init__()
        self._capture = capture

    def start(self, config: EngineConfig) -> Capacity:
        self._runner = Runner(config, self._capture)
        return self._runner.capacity


def _config(folder: Path, **changes: Any) -> EngineConfig:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 0.02, "max_num_seqs": 11, "seed": 0}
    return EngineConfig(model=str(folder), num_threads=1, op_provider="torch", attention_backend="torch", **options | changes)


def _generate(core: EngineCore, num_requests: int, max_tokens: Callable[[int], int]) -> dict[str, list[int]]:
    for i in range(num_requests):
        params = SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=max_tokens(i), ignore_eos=True)
        prompt = [10 + (7 * i + j) % 200 for j in range(1 + 5 * i)]
        core.add(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params, arrival_s=float(i)))
    tokens: dict[str, list[int]] = {}
    while core.has_unfinished:
        for update in core.step():
            assert update.error is None
            for sequence in update.sequences:
                tokens.setdefault(update.request_id, []).extend(sequence.new_token_ids)
    return tokens


def test_captured_sizes_are_few_and_the_largest_step_is_one_of_them() -> None:
    assert captured_sizes(1) == (1,)
    assert captured_sizes(4) == (1, 2, 4)
    assert captured_sizes(13) == (1, 2, 4, 8, 13)
    assert captured_sizes(256) == (1, 2, 4, *range(8, 257, 8))


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 8, 13, 64, 100])
def test_no_step_has_more_padding_than_there_are_spare_slots(max_num_seqs: int) -> None:
    sizes = captured_sizes(max_num_seqs)
    padding = [min(s for s in sizes if s >= count) - count for count in range(1, max_num_seqs + 1)]
    assert max(padding) == num_spare_slots(max_num_seqs)


def _decodes(lens: list[int], block_size: int) -> Step:
    sequences, block = [], 0
    for i, length in enumerate(lens):
        table = list(range(block, block + -(-length // block_size)))
        block += len(table)
        sequences.append(ScheduledSequence(sequence_id=i, token_ids=[i], num_computed_tokens=length - 1, block_table=table))
    return Step(sequences=tuple(sequences))


def test_padding_rows_have_slots_of_their_own_behind_all_blocks() -> None:
    lens, block_size, num_blocks = [5, 1, 40], 4, 16
    batch = pad_decodes(lay_out(_decodes(lens, block_size), block_size), 8, 20, num_blocks * block_size, block_size)
    assert batch.block_tables.shape == (8, 20)
    assert batch.slot_mapping[3:].tolist() == [64, 65, 66, 67, 68]
    assert batch.block_tables[3:, 0].tolist() == [16, 16, 16, 16, 17]
    assert batch.seq_lens.tolist() == [*lens, 1, 1, 1, 1, 1]
    assert batch.query_start_loc.tolist() == list(range(9))
    assert len(batch.logits_rows) == 0


def test_padding_changes_no_bit_of_the_attention_of_other_rows() -> None:
    lens, block_size, num_blocks = [5, 1, 40, 17, 3], 4, 20
    spec = KVCacheSpec(
        attention=(AttentionSpec(layer=0, scale=0.25),),
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        block_size=block_size,
        dtype=torch.float32,
        device=CPU,
    )
    backend = TorchAttention(spec)
    cache = torch.randn(backend.kv_shape(num_blocks + 1), generator=torch.Generator().manual_seed(0))
    q, k, v = (torch.randn(8, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    plain = lay_out(_decodes(lens, block_size), block_size)
    padded = pad_decodes(plain, 8, 16, num_blocks * block_size, block_size)
    kv, kv_padded = cache.clone(), cache.clone()
    expected = backend.forward(spec.attention[0], q[:5], k[:5], v[:5], kv, backend.plan(upload(plain, CPU).attention))
    found = backend.forward(spec.attention[0], q, k, v, kv_padded, backend.plan(upload(padded, CPU).attention))
    assert torch.equal(found[:5], expected)
    assert torch.equal(kv_padded[:num_blocks], kv[:num_blocks])


@pytest.mark.parametrize("run_ahead", ["never", "always"])
@pytest.mark.parametrize("block_size", [16, 2])
def test_captured_steps_give_the_same_tokens(tiny_llama: Path, block_size: int, run_ahead: str) -> None:
    recorder = Recorder()
    config = _config(tiny_llama, block_size=block_size)
    plain = EngineCore(config)
    captured = EngineCore(replace(config, run_ahead=run_ahead), CapturingExecutor(recorder))
    # Sequences end one by one, so that steps have all sizes from 11 to 1.
    expected = _generate(plain, 11, lambda i: 3 + 2 * i)
    assert _generate(captured, 11, lambda i: 3 + 2 * i) == expected
    assert recorder.num_captured == len(captured_sizes(11))
    assert recorder.num_repeated > 0
    captured.scheduler.check()


def test_longer_contexts_get_wider_tables(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheflow.worker.graphs.LEAST_CONTEXT", 32)
    recorder = Recorder()
    config = _config(tiny_llama, block_size=4)
    expected = _generate(EngineCore(config), 1, lambda i: 100)
    assert _generate(EngineCore(config, CapturingExecutor(recorder)), 1, lambda i: 100) == expected
    assert recorder.num_captured == 3  # 32, 64 and 128 tokens
    assert LEAST_CONTEXT > 32


def test_where_nothing_can_be_captured_steps_run_all_the_same(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: Run) -> Run:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = _config(tiny_llama)
    expected = _generate(EngineCore(config), 3, lambda i: 8)
    assert _generate(EngineCore(config, CapturingExecutor(fail)), 3, lambda i: 8) == expected
    assert sum("CUDA graph" in record.getMessage() for record in caplog.records) == 1
