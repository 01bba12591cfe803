"""Raw log probabilities: of chosen tokens, of the most likely ones, and of a prompt's own tokens.

"Raw" is the model's own distribution, before penalties, temperature and masks. This module chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cacheflow.types import Logprobs

BLOCK = 256
"""Neighbours that are asked for their maximum when the most likely tokens are looked for."""
MAX_SLICE_ELEMENTS = 1 << 22
"""Logits scored at a time, 16 MiB in float32: a long chunk's `[tokens, vocab]` never exists."""


def top_tokens(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` most likely tokens of each row, best first, of equals the lowest id first.

    They lie in the `count` blocks with the largest maxima, of equals the first: each of these has a token that comes before any
    in another block. So most of a vocabulary is only asked for its maxima.

    Args:
        logits: `[num_rows, vocab_size]`.
        count: At least 1; more than the vocabulary has counts as all of it.

    Returns:
        Ids `[num_rows, count] int64` and their logits.
    """
    vocab_size = logits.shape[1]
    count, num_blocks = min(count, vocab_size), vocab_size // BLOCK
    if count >= num_blocks:
        return _sorted_top(logits, count)
    end = num_blocks * BLOCK
    blocks = logits[:, :end].unflatten(-1, (num_blocks, BLOCK))
    ranked = blocks.amax(dim=-1).sort(dim=-1, descending=True, stable=True).indices
    best = ranked[:, :count].sort(dim=-1).values[..., None]
    tail = torch.arange(end, vocab_size, device=logits.device).expand(len(logits), -1)
    ids = torch.cat(((best * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1), tail), dim=1)
    places, values = _sorted_top(logits.gather(1, ids), count)
    return ids.gather(1, places), values


def _sorted_top(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `top_tokens`, among places in a row."""
    least = logits.topk(count, dim=-1).values[:, -1:]
    ids = keep_first(logits, least, torch.full_like(least, count, dtype=torch.int64)).nonzero()[:, 1].view(-1, count)
    # Ids ascend here, so that a stable sort by value leaves the lowest first among equals.
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), values


def keep_first(logits: torch.Tensor, least: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Marks the first `count` tokens in the order (most likely first, of equals the lowest id first).

    `torch.topk` leaves open which of several equals it returns, and bfloat16 logits are full of equals.

    Args:
        logits: `[num_rows, vocab_size]`.
        least: `[num_rows, 1]`: the `count`-th largest logit of each row.
        count: `[num_rows, 1] int64`.

    Returns:
        `[num_rows, vocab_size] bool` with `count` true entries a row.
    """
    kept = logits >= least
    crowded = (kept.sum(dim=-1) > count[:, 0]).nonzero()[:, 0]
    if len(crowded):
        rows, limits = logits[crowded], least[crowded]
        above, tied = rows > limits, rows == limits
        room = count[crowded] - above.sum(dim=-1, keepdim=True)
        kept[crowded] = above | (tied & (tied.cumsum(dim=-1) <= room))
    return kept


def score_tokens(
    project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, token_ids: Sequence[int], vocab_size: int, count: int
) -> list[Logprobs]:
    """Log probabilities of given tokens behind given hidden states, slice by slice.

    Args:
        project: `[num_rows, hidden_size]` to logits `[num_rows, vocab_size]`.
        hidden: `[num_rows, hidden_size]`.
        token_ids: The token after each row.
        vocab_size: Of the logits.
        count: Most likely tokens to give beside each.

    Returns:
        One entry per row: its token first, then the most likely ones, best first.
    """
    scored: list[Logprobs] = []
    num_rows = max(1, MAX_SLICE_ELEMENTS // vocab_size)
    for start in range(0, len(token_ids), num_rows):
        logits = project(hidden[start : start + num_rows]).float()
        chosen = torch.tensor(token_ids[start : start + num_rows], device=logits.device)
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        scored += logprob_entries(logits, normaliser, chosen[:, None], [count] * len(chosen))
    return scored


def logprob_entries(
    logits: torch.Tensor, normaliser: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]
) -> list[Logprobs]:
    """One entry per chosen token: that token first, then the most likely ones of its row, best first.

    Args:
        logits: `[num_rows, vocab_size] float32`, raw.
        normaliser: `[num_rows, 1] float32`: log of the sum of their exponentials.
        token_ids: `[num_rows, num_chosen] int64`.
        counts: How many of the most likely tokens each row wants.

    Returns:
        `num_rows * num_chosen` entries, row by row.
    """
    chosen = (logits.gather(1, token_ids) - normaliser).tolist()
    most = max(counts, default=0)
    top_ids: list[list[int]] = [[]] * len(counts)
    top_values: list[list[float]] = top_ids  # type: ignore[assignment]
    if most:
        ids, values = top_tokens(logits, most)
        top_ids, top_values = ids.tolist(), (values - normaliser).tolist()
    entries = []
    for row, (tokens, count) in enumerate(zip(token_ids.tolist(), counts, strict=True)):
        best = list(zip(top_ids[row][:count], top_values[row][:count], strict=True))
        for token, value in zip(tokens, chosen[row], strict=True):
            entry = {token: value}
            entry.update(best)
            entries.append(entry)
    return entries
