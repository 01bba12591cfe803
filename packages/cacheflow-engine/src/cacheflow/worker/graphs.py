"""Decode steps as CUDA graphs: a few captured shapes, steps padded to the next of them, inputs refilled, then one launch.

A step of decodes launches some ten small kernels a layer, and it is the host that can't launch them fast enough. A graph
launches all of them at once, but always on the same memory and with the same grids. What must be the same is the number of rows
and the width of the block tables: graphs are kept by both, and made when a step first needs them.

How a forward pass is recorded is given from outside, so that shapes, padding and refilling run on any device. It knows no
requests, and does not choose tokens: that differs from row to row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cacheflow.worker.batch import pad_decodes

if TYPE_CHECKING:
    from cacheflow.interfaces import AttentionBackend
    from cacheflow.worker.batch import HostInput, ModelInput

logger = logging.getLogger(__name__)

ROW_STEP = 8
"""From 8 rows on, the captured numbers of rows are its multiples: below it padding would cost more than it saves."""
LEAST_CONTEXT = 1024
"""Tokens that the narrowest block tables have room for; wider ones double. Programs for blocks that a sequence doesn't have end
at once, but there may be thousands of them. Not measured."""

Run = Callable[[], None]
Capture = Callable[[Run], Run]
"""Records what it is given, which has run once, and returns what repeats it on the same memory."""
Forward = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
"""Of input ids, positions and the backend's plan: the hidden states."""


def captured_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows that are captured: 1, 2, 4, then every eighth, and the largest that there can be."""
    sizes = [1, 2, 4, *range(ROW_STEP, max_num_seqs, ROW_STEP)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def num_spare_slots(max_num_seqs: int) -> int:
    """Slots of the cache that padding rows write to: no step has more of them."""
    sizes = captured_sizes(max_num_seqs)
    return max(after - before - 1 for before, after in zip((0, *sizes), sizes, strict=False))


@dataclass
class _Captured:
    """One captured shape: its plan, whose tensors it reads, and what repeats it."""

    plan: Any
    repeat: Run


class DecodeGraphs:
    """The captured shapes of a runner, with the memory that they share: inputs and hidden states of the largest.

    Args:
        forward: The model on a plan.
        backend: Makes and refills plans.
        capture: `capture_cuda_graphs()`, or whatever repeats a call.
        max_num_seqs: Most rows of a step.
        max_num_blocks: Most blocks of a sequence.
        block_size: Tokens of a block.
        spare_block: The first of the blocks that no request can have, with `num_spare_slots` slots.
        hidden_size: Elements of a hidden state.
        dtype: Of hidden states.
        device: Where it all lies.
    """

    def __init__(
        self,
        forward: Forward,
        backend: AttentionBackend,
        capture: Capture,
        *,
        max_num_seqs: int,
        max_num_blocks: int,
        block_size: int,
        spare_block: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._backend = backend
        self._capture = capture
        self._sizes = captured_sizes(max_num_seqs)
        self._max_num_blocks = max_num_blocks
        self._block_size = block_size
        self._spare_block = spare_block
        self._input_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(max_num_seqs, hidden_size, dtype=dtype, device=device)
        self._captured: dict[tuple[int, int], _Captured] | None = {}

    def pad(self, batch: HostInput) -> HostInput | None:
        """The batch in the next captured shape, or None: it is none of decodes alone, or nothing is captured any more."""
        if self._captured is None or not batch.is_all_decodes:
            return None
        num_rows = next(size for size in self._sizes if size >= len(batch.seq_lens))
        width = self._width(batch.block_tables.shape[1])
        return pad_decodes(batch, num_rows, width, self._spare_block * self._block_size, self._block_size)

    def run(self, batch: ModelInput) -> torch.Tensor:
        """Hidden states of a padded batch, `[num_rows, hidden_size]`, valid until the next call."""
        num_rows = len(batch.input_ids)
        input_ids, positions = self._input_ids[:num_rows], self._positions[:num_rows]
        input_ids.copy_(batch.input_ids)
        positions.copy_(batch.positions)
        assert self._captured is not None
        shape = (num_rows, batch.attention.block_tables.shape[1])
        captured = self._captured.get(shape)
        if captured is not None:
            captured.plan = self._backend.plan(batch.attention, into=captured.plan)
            captured.repeat()
            return self._hidden[:num_rows]
        captured = _Captured(self._backend.plan(batch.attention), lambda: None)

        def run() -> None:
            self._hidden[:num_rows].copy_(self._forward(input_ids, positions, captured.plan))

        # This step's result; and whatever is compiled, tuned or made on first use is so outside of the graph.
        run()
        try:
            captured.repeat = self._capture(run)
        except RuntimeError as error:
            logger.warning("No CUDA graph can be made here, so that steps of decodes are launched kernel by kernel: %s", error)
            self._captured = None
            return self._hidden[:num_rows]
        self._captured[shape] = captured
        logger.debug("Captured a decode step of %d rows with %d blocks each.", *shape)
        return self._hidden[:num_rows]

    def _width(self, num_blocks: int) -> int:
        """The width of block tables that has room for so many."""
        width = max(1, LEAST_CONTEXT // self._block_size)
        while width < num_blocks:
            width *= 2
        return min(width, self._max_num_blocks)


def capture_cuda_graphs() -> Capture:
    """Captures into CUDA graphs that take their scratch memory from one pool: they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return capture
