"""`Step` → `ModelInput`: lays a step's tokens out in one row. Pure: numbers in, tensors out, nothing kept.

It knows neither model nor cache layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from cacheflow.interfaces import AttentionMetadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cacheflow.interfaces import SampleSpec, Step


@dataclass(frozen=True)
class ScoredRows:
    """A part of a prompt whose tokens are to be scored.

    Attributes:
        index: The sequence's place in the step.
        start: The first row behind which a token is scored.
        token_ids: The tokens after this row and the following ones.
        count: Most likely tokens to give beside each.
    """

    index: int
    start: int
    token_ids: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class ModelInput:
    """A step as the model, the attention backend and the sampler take it. Rows: one per scheduled token, decodes first.

    Attributes:
        input_ids: `[num_tokens] int64`.
        positions: `[num_tokens] int64`: places in the sequences.
        attention: For the attention backend.
        logits_rows: `[num_sampled] int64`: the last rows of the sequences that choose tokens.
        specs: All choices to make.
        row_of_spec: For each, its place in `logits_rows`.
        spec_owner: For each, its sequence's place in the step.
        scored: What prompt log probabilities are wanted of.
        pooled: Sequences whose hidden states are wanted: place in the step, first row, row behind the last.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    logits_rows: torch.Tensor
    specs: tuple[SampleSpec, ...]
    row_of_spec: tuple[int, ...]
    spec_owner: tuple[int, ...]
    scored: tuple[ScoredRows, ...]
    pooled: tuple[tuple[int, int, int], ...]


def build_input(step: Step, block_size: int, device: torch.device) -> ModelInput:
    """Lays out a step with at least one sequence.

    Args:
        step: Its sequences come in any order.
        block_size: Tokens of a block.
        device: Where the tensors are wanted.
    """
    query_lens = np.fromiter((len(s.token_ids) for s in step.sequences), np.int64, len(step.sequences))
    # Sequences of one query token come first, each kind in the step's order.
    order = np.argsort(query_lens > 1, kind="stable")
    sequences = [step.sequences[i] for i in order]
    query_lens = query_lens[order]
    query_start_loc = np.concatenate((np.zeros(1, np.int64), query_lens.cumsum()))
    num_tokens = int(query_start_loc[-1])
    num_computed = np.fromiter((s.num_computed_tokens for s in sequences), np.int64, len(sequences))
    seq_lens = num_computed + query_lens

    input_ids = np.fromiter(chain.from_iterable(s.token_ids for s in sequences), np.int64, num_tokens)
    owner = np.repeat(np.arange(len(sequences)), query_lens)
    positions = np.arange(num_tokens) + (num_computed - query_start_loc[:-1])[owner]
    block_tables = _block_tables([s.block_table for s in sequences], -(-seq_lens // block_size))
    slot_mapping = block_tables[owner, positions // block_size] * block_size + positions % block_size

    sampled = [i for i, s in enumerate(sequences) if s.samples]
    specs, row_of_spec, spec_owner = [], [], []
    for row, i in enumerate(sampled):
        specs += sequences[i].samples
        row_of_spec += [row] * len(sequences[i].samples)
        spec_owner += [int(order[i])] * len(sequences[i].samples)
    scored = tuple(
        ScoredRows(int(order[i]), int(query_start_loc[i]), tuple(s.scored_token_ids), s.num_prompt_logprobs)
        for i, s in enumerate(sequences)
        if s.num_prompt_logprobs is not None
    )
    ends = query_start_loc[1:].tolist()
    pooled = tuple(
        (int(order[i]), ends[i] - (1 if s.pooling == "last" else len(s.token_ids)), ends[i])
        for i, s in enumerate(sequences)
        if s.pooling is not None
    )

    def tensor(values: NDArray[np.int64], dtype: type[np.integer] = np.int64) -> torch.Tensor:
        return torch.from_numpy(values.astype(dtype, copy=False)).to(device)

    return ModelInput(
        input_ids=tensor(input_ids),
        positions=tensor(positions),
        attention=AttentionMetadata(
            query_start_loc=tensor(query_start_loc, np.int32),
            seq_lens=tensor(seq_lens, np.int32),
            block_tables=tensor(block_tables, np.int32),
            slot_mapping=tensor(slot_mapping),
            num_decodes=int((query_lens == 1).sum()),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
        ),
        logits_rows=tensor(query_start_loc[1:][sampled] - 1),
        specs=tuple(specs),
        row_of_spec=tuple(row_of_spec),
        spec_owner=tuple(spec_owner),
        scored=scored,
        pooled=pooled,
    )


def _block_tables(tables: list[Sequence[int]], num_blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[num_seqs, most blocks]`: of each table the blocks that its tokens need, then -1."""
    filled = np.full((len(tables), int(num_blocks.max())), -1, np.int64)
    used = chain.from_iterable(table[:count] for table, count in zip(tables, num_blocks.tolist(), strict=True))
    filled[np.arange(filled.shape[1]) < num_blocks[:, None]] = np.fromiter(used, np.int64, int(num_blocks.sum()))
    return filled
