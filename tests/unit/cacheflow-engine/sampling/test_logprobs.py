"""The order of the most likely tokens, and scores of given tokens in slices."""

from __future__ import annotations

import pytest
import torch

from cacheflow.sampling import logprobs
from cacheflow.sampling.logprobs import score_tokens, top_tokens


def test_top_tokens_are_ordered_by_value_then_by_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    ids, values = top_tokens(logits, 4)
    assert ids.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]]
    assert values.tolist() == [[3, 3, 2, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize("vocab_size", [logprobs.BLOCK, 5 * logprobs.BLOCK, 5 * logprobs.BLOCK + 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_tokens_of_many_blocks_are_those_of_a_whole_sort(vocab_size: int, dtype: torch.dtype) -> None:
    # Few different numbers, so that equals lie in several blocks.
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(0)).round().to(dtype)
    logits[4], logits[5, 3:] = 0, -torch.inf
    ranked = logits.sort(dim=-1, descending=True, stable=True)
    for count in (1, 3, 4, 5, 20):
        ids, values = top_tokens(logits, count)
        assert torch.equal(ids, ranked.indices[:, :count])
        assert torch.equal(values, ranked.values[:, :count])


def test_more_top_tokens_than_there_are_means_all() -> None:
    assert top_tokens(torch.tensor([[1.0, 2.0]]), 5)[0].tolist() == [[1, 0]]


@pytest.mark.parametrize("max_elements", [1, 40, 10_000])
def test_scores_do_not_depend_on_the_slices(max_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "MAX_SLICE_ELEMENTS", max_elements)
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    expected = (hidden @ weight.T).log_softmax(-1)
    largest = 0

    def project(rows: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(rows) * 20)
        return rows @ weight.T

    tokens = [3, 19, 0, 3, 7, 7, 1, 2, 5]
    entries = score_tokens(project, hidden, tokens, 20, 2)
    assert len(entries) == 9
    assert largest <= max(20, max_elements)
    for row, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
        assert list(entry)[0] == token
        assert set(expected[row].topk(2).indices.tolist()) <= set(entry)
        for key, value in entry.items():
            assert value == pytest.approx(expected[row, key].item(), abs=1e-5)
