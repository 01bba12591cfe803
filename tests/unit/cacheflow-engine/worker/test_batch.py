"""A step laid out in one row: where every token goes, for steps of every shape."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.interfaces import SampleSpec, ScheduledSequence, Step
from cacheflow.types import SamplingParams
from cacheflow.worker.batch import ModelInput, ScoredRows, build_input, lay_out

CPU = torch.device("cpu")


def _spec(sequence_id: int, index: int = 0) -> SampleSpec:
    return SampleSpec(
        sequence_id=sequence_id,
        request_index=sequence_id,
        index=index,
        params=SamplingParams(seed=0),
        prompt_token_ids=[1],
        output_token_ids=[],
    )


def _scheduled(
    sequence_id: int, num_computed: int, tokens: list[int], blocks: list[int], num_samples: int = 0
) -> ScheduledSequence:
    return ScheduledSequence(
        sequence_id=sequence_id,
        token_ids=tokens,
        num_computed_tokens=num_computed,
        block_table=blocks,
        samples=tuple(_spec(sequence_id, i) for i in range(num_samples)),
    )


@st.composite
def _steps(draw: st.DrawFn) -> tuple[Step, int]:
    """A step of sequences that share no block, and the block size."""
    block_size = draw(st.sampled_from([1, 3, 8, 16]))
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 30))), min_size=1, max_size=8))
    counts = [-(-(computed + new) // block_size) + draw(st.integers(0, 2)) for computed, new in lengths]
    blocks = draw(st.permutations(range(sum(counts))))
    sequences = []
    for i, ((computed, new), count) in enumerate(zip(lengths, counts, strict=True)):
        table, blocks = list(blocks[:count]), blocks[count:]
        tokens = draw(st.lists(st.integers(0, 50_000), min_size=new, max_size=new))
        sequences.append(_scheduled(i, computed, tokens, table, draw(st.integers(0, 2))))
    return Step(sequences=tuple(sequences)), block_size


def _rows_of(batch: ModelInput, place: int) -> slice:
    starts = batch.attention.query_start_loc.tolist()
    return slice(starts[place], starts[place + 1])


def _order(step: Step) -> list[int]:
    """The step's sequences as a batch has them: decodes first."""
    return sorted(range(len(step.sequences)), key=lambda i: len(step.sequences[i].token_ids) > 1)


@given(_steps())
def test_every_token_is_stored_where_the_block_table_says(drawn: tuple[Step, int]) -> None:
    step, block_size = drawn
    batch = build_input(step, block_size, CPU)
    for place, i in enumerate(_order(step)):
        sequence, rows = step.sequences[i], _rows_of(batch, place)
        assert batch.input_ids[rows].tolist() == list(sequence.token_ids)
        positions = range(sequence.num_computed_tokens, sequence.num_computed_tokens + len(sequence.token_ids))
        assert batch.positions[rows].tolist() == list(positions)
        expected = [sequence.block_table[p // block_size] * block_size + p % block_size for p in positions]
        assert batch.attention.slot_mapping[rows].tolist() == expected


@given(_steps())
def test_slots_are_distinct(drawn: tuple[Step, int]) -> None:
    slots = build_input(*drawn, CPU).attention.slot_mapping.tolist()
    assert len(set(slots)) == len(slots)


@given(_steps())
def test_the_metadata_describes_the_batch(drawn: tuple[Step, int]) -> None:
    step, block_size = drawn
    attention = build_input(step, block_size, CPU).attention
    sequences = [step.sequences[i] for i in _order(step)]
    query_lens = [len(s.token_ids) for s in sequences]
    seq_lens = [s.num_computed_tokens + len(s.token_ids) for s in sequences]
    assert attention.query_start_loc.diff().tolist() == query_lens
    assert attention.seq_lens.tolist() == seq_lens
    assert attention.num_decodes == query_lens.count(1)
    assert (attention.max_query_len, attention.max_seq_len) == (max(query_lens), max(seq_lens))
    for row, sequence, length in zip(attention.block_tables.tolist(), sequences, seq_lens, strict=True):
        count = -(-length // block_size)
        assert row[:count] == list(sequence.block_table[:count])
        assert set(row[count:]) <= {-1}
    dtypes = (attention.query_start_loc.dtype, attention.seq_lens.dtype, attention.block_tables.dtype)
    assert dtypes == (torch.int32, torch.int32, torch.int32)
    assert attention.slot_mapping.dtype == torch.int64


@given(_steps())
def test_every_choice_reads_the_last_row_of_its_sequence(drawn: tuple[Step, int]) -> None:
    step, block_size = drawn
    batch = build_input(step, block_size, CPU)
    last_rows = {i: _rows_of(batch, place).stop - 1 for place, i in enumerate(_order(step))}
    assert len(batch.logits_rows) == sum(bool(s.samples) for s in step.sequences)
    by_owner: dict[int, list[SampleSpec]] = {}
    for spec, row, owner in zip(batch.specs, batch.row_of_spec, batch.spec_owner, strict=True):
        assert batch.logits_rows[row] == last_rows[owner]
        by_owner.setdefault(owner, []).append(spec)
    for i, sequence in enumerate(step.sequences):
        assert by_owner.get(i, []) == list(sequence.samples)


@given(_steps())
def test_decodes_are_laid_out_alone_as_beside_a_prompt(drawn: tuple[Step, int]) -> None:
    step, block_size = drawn
    decodes = tuple(s for s in step.sequences if len(s.token_ids) == 1)
    prompt = _scheduled(100, 0, [1, 2], list(range(2)), 1)
    if not decodes:
        return
    alone = lay_out(Step(sequences=decodes), block_size)
    beside = lay_out(Step(sequences=(*decodes, prompt)), block_size)
    count, width = alone.block_tables.shape
    for name in ("input_ids", "positions", "seq_lens", "slot_mapping"):
        mine, other = getattr(alone, name), getattr(beside, name)
        assert mine.dtype == other.dtype
        assert mine.tolist() == other[:count].tolist()
    assert alone.query_start_loc.tolist() == beside.query_start_loc[: count + 1].tolist()
    assert alone.block_tables.tolist() == beside.block_tables[:count, :width].tolist()
    assert (beside.block_tables[:count, width:] == -1).all()
    assert alone.logits_rows.tolist() == beside.logits_rows[:-1].tolist()
    assert (*alone.specs, *prompt.samples) == beside.specs
    assert alone.row_of_spec == beside.row_of_spec[:-1]
    assert alone.spec_owner == beside.spec_owner[:-1]


def test_scored_tokens_keep_their_rows_and_their_place_in_the_step() -> None:
    prompt = ScheduledSequence(
        sequence_id=1,
        token_ids=[5, 6, 7],
        num_computed_tokens=4,
        block_table=[0, 1],
        num_prompt_logprobs=2,
        scored_token_ids=[6, 7],
    )
    step = Step(sequences=(prompt, _scheduled(2, 9, [3], [2, 3, 4], 1)))
    batch = build_input(step, 4, CPU)
    assert batch.input_ids.tolist() == [3, 5, 6, 7]
    assert batch.scored == (ScoredRows(index=0, start=1, token_ids=(6, 7), count=2),)


def test_a_step_without_choices_wants_no_logits() -> None:
    batch = build_input(Step(sequences=(_scheduled(1, 0, [5, 6], [0]),)), 4, CPU)
    assert batch.logits_rows.shape == (0,)
    assert batch.specs == batch.row_of_spec == batch.spec_owner == batch.scored == ()
