"""`Step` → `HostInput` → `ModelInput`: lays a step's tokens out in one row, then takes it to the device in one copy.

Pure: numbers in, tensors out, nothing kept. It knows neither model nor cache layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np
import torch

from cacheflow.interfaces import AttentionMetadata
from cacheflow.sampling.transfer import all_to_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
class HostInput:
    """A step laid out on the host. Rows: one per scheduled token, decodes first.

    Attributes:
        input_ids: `[num_tokens] int64`.
        positions: `[num_tokens] int64`: places in the sequences.
        query_start_loc: `[num_seqs + 1] int32`: as `AttentionMetadata` has it, and so are the next three.
        seq_lens: `[num_seqs] int32`.
        block_tables: `[num_seqs, max_num_blocks] int32`.
        slot_mapping: `[num_tokens] int64`.
        num_decodes: How many of the first sequences have exactly one query token.
        chosen_rows: `[num_tokens] int64`: which of the step before's choices is each input token; empty where tokens are known.
        logits_rows: `[num_sampled] int64`: the last rows of the sequences that choose tokens.
        specs: All choices to make.
        row_of_spec: For each, its place in `logits_rows`.
        spec_owner: For each, its sequence's place in the step.
        scored: What prompt log probabilities are wanted of.
        pooled: Sequences whose hidden states are wanted: place in the step, first row, row behind the last.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    num_decodes: int
    chosen_rows: NDArray[np.int64]
    logits_rows: NDArray[np.int64]
    specs: tuple[SampleSpec, ...]
    row_of_spec: tuple[int, ...]
    spec_owner: tuple[int, ...]
    scored: tuple[ScoredRows, ...]
    pooled: tuple[tuple[int, int, int], ...]

    @property
    def is_all_decodes(self) -> bool:
        """Whether every sequence has one token."""
        return self.num_decodes == len(self.seq_lens)


@dataclass(frozen=True)
class ModelInput:
    """A step as the model, the attention backend and the sampler take it: a `HostInput` whose arrays are on the device.

    Attributes:
        input_ids: `[num_tokens] int64`.
        positions: `[num_tokens] int64`.
        attention: For the attention backend.
        logits_rows: `[num_sampled] int64`.
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
    """Lays out a step with at least one sequence, on the device.

    Args:
        step: Its sequences come in any order.
        block_size: Tokens of a block.
        device: Where the tensors are wanted.
    """
    return upload(lay_out(step, block_size), device)


def lay_out(step: Step, block_size: int, chosen_rows: Mapping[int, int] | None = None) -> HostInput:
    """Lays out a step with at least one sequence, on the host.

    Args:
        step: Its sequences come in any order.
        block_size: Tokens of a block.
        chosen_rows: Where the step before chose a token for each sequence, by its id; wanted of a step that follows it.
    """
    if all(len(s.token_ids) == 1 and s.num_prompt_logprobs is None and s.pooling is None for s in step.sequences):
        return _lay_out_decodes(step, block_size, chosen_rows)
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
    block_tables = _block_tables([s.block_table for s in sequences], (-(-seq_lens // block_size)).tolist())
    slot_mapping = block_tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size

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

    rows = chosen_rows or {}
    return HostInput(
        input_ids=input_ids,
        positions=positions,
        query_start_loc=query_start_loc.astype(np.int32),
        seq_lens=seq_lens.astype(np.int32),
        block_tables=block_tables,
        slot_mapping=slot_mapping,
        num_decodes=int((query_lens == 1).sum()),
        chosen_rows=np.array([rows[s.sequence_id] for s in sequences] if step.follows else [], np.int64),
        logits_rows=query_start_loc[1:][sampled] - 1,
        specs=tuple(specs),
        row_of_spec=tuple(row_of_spec),
        spec_owner=tuple(spec_owner),
        scored=scored,
        pooled=pooled,
    )


def _lay_out_decodes(step: Step, block_size: int, chosen_rows: Mapping[int, int] | None) -> HostInput:
    """As `lay_out`, of nearly all steps in the shortest way: the model has just swept the caches that numpy's code was in."""
    sequences, count = step.sequences, len(step.sequences)
    positions = [s.num_computed_tokens for s in sequences]
    slots = [s.block_table[p // block_size] * block_size + p % block_size for s, p in zip(sequences, positions, strict=True)]
    sampled = [i for i, s in enumerate(sequences) if s.samples]
    owners = [(row, i) for row, i in enumerate(sampled) for _ in sequences[i].samples]
    rows = chosen_rows or {}
    return HostInput(
        input_ids=np.array([s.token_ids[0] for s in sequences], np.int64),
        positions=np.array(positions, np.int64),
        query_start_loc=np.arange(count + 1, dtype=np.int32),
        seq_lens=np.array([p + 1 for p in positions], np.int32),
        block_tables=_block_tables([s.block_table for s in sequences], [p // block_size + 1 for p in positions]),
        slot_mapping=np.array(slots, np.int64),
        num_decodes=count,
        chosen_rows=np.array([rows[s.sequence_id] for s in sequences] if step.follows else [], np.int64),
        logits_rows=np.array(sampled, np.int64),
        specs=tuple(chain.from_iterable(sequences[i].samples for i in sampled)),
        row_of_spec=tuple(row for row, _ in owners),
        spec_owner=tuple(i for _, i in owners),
        scored=(),
        pooled=(),
    )


def pad_decodes(batch: HostInput, num_rows: int, num_blocks: int, spare_slot: int, block_size: int) -> HostInput:
    """A step of decodes widened to `num_rows` sequences and tables of `num_blocks`; what is chosen stays the same.

    Padding rows are sequences of one token in blocks that no request can have, a slot for each, so that they change nothing.

    Args:
        batch: All decodes.
        num_rows: At least as many as it has.
        num_blocks: At least the width of its tables.
        spare_slot: The first slot that no request can have, of a block's first; `num_rows - 1` follow it.
        block_size: Tokens of a block.
    """
    assert batch.is_all_decodes
    count, width = batch.block_tables.shape
    num_more = num_rows - count
    slots = spare_slot + np.arange(num_more)
    block_tables = np.full((num_rows, num_blocks), -1, np.int32)
    block_tables[:count, :width] = batch.block_tables
    block_tables[count:, 0] = slots // block_size
    return replace(
        batch,
        input_ids=np.concatenate((batch.input_ids, np.zeros(num_more, np.int64))),
        positions=np.concatenate((batch.positions, np.zeros(num_more, np.int64))),
        query_start_loc=np.arange(num_rows + 1, dtype=np.int32),
        seq_lens=np.concatenate((batch.seq_lens, np.ones(num_more, np.int32))),
        block_tables=block_tables,
        slot_mapping=np.concatenate((batch.slot_mapping, slots)),
        num_decodes=num_rows,
        chosen_rows=np.concatenate((batch.chosen_rows, np.zeros(num_more if len(batch.chosen_rows) else 0, np.int64))),
    )


def upload(batch: HostInput, device: torch.device, chosen: torch.Tensor | None = None) -> ModelInput:
    """The batch on the device, in one copy.

    Args:
        batch: It.
        device: Where it is wanted.
        chosen: `[num_choices] int64` on the device: the tokens that the step before chose; read where `chosen_rows` says so.
    """
    input_ids, positions, slot_mapping, chosen_rows, logits_rows, query_start_loc, seq_lens, block_tables = all_to_device(
        (
            batch.input_ids,
            batch.positions,
            batch.slot_mapping,
            batch.chosen_rows,
            batch.logits_rows,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_tables,
        ),
        device,
    )
    if len(batch.chosen_rows):
        assert chosen is not None
        input_ids = chosen.index_select(0, chosen_rows)
    return ModelInput(
        input_ids=input_ids,
        positions=positions,
        attention=AttentionMetadata(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_decodes=batch.num_decodes,
            max_query_len=1 if batch.is_all_decodes else int(np.diff(batch.query_start_loc).max()),
            max_seq_len=int(batch.seq_lens.max()),
        ),
        logits_rows=logits_rows,
        specs=batch.specs,
        row_of_spec=batch.row_of_spec,
        spec_owner=batch.spec_owner,
        scored=batch.scored,
        pooled=batch.pooled,
    )


def _block_tables(tables: Sequence[Sequence[int]], num_blocks: Sequence[int]) -> NDArray[np.int32]:
    """`[num_seqs, most blocks]`: of each table the blocks that its tokens need, then -1."""
    most = max(num_blocks)
    filled = chain.from_iterable(
        chain(table[:count], repeat(-1, most - count)) for table, count in zip(tables, num_blocks, strict=True)
    )
    return np.fromiter(filled, np.int32, len(tables) * most).reshape(len(tables), most)
