"""A checkpoint tensor that is cut into shards and joined again is unchanged."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.interfaces import OpSpec
from cacheflow.layers import BuildContext
from cacheflow.layers.parameters import Shard
from cacheflow.layers.torch_ops import TorchOps

CPU = torch.device("cpu")
SIZES = st.integers(1, 9)


class Rank:
    """One of several ranks; nothing here talks to the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def contexts(num_ranks: int) -> list[BuildContext]:
    ops = TorchOps(OpSpec(dtype=torch.float32, device=CPU))
    return [BuildContext(ops, torch.float32, CPU, Rank(rank, num_ranks)) for rank in range(num_ranks)]


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), axis=st.sampled_from([None, 0, 1]), num_ranks=SIZES)
def test_joining_the_cuts_of_a_tensor_gives_the_tensor(rows: int, columns: int, axis: int | None, num_ranks: int) -> None:
    whole = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    cuts = [Shard((rows, columns), axis, rank, num_ranks).cut(whole) for rank in range(num_ranks)]
    assert torch.equal(Shard((rows, columns), axis, 0, num_ranks).join(cuts), whole)


@given(
    units=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    unit=st.integers(1, 4),
    in_units=st.integers(1, 4),
    split=st.sampled_from([None, "column", "row"]),
    num_ranks=st.integers(1, 4),
)
def test_fused_matrices_joined_over_ranks_are_the_checkpoints(
    units: list[int], unit: int, in_units: int, split: str | None, num_ranks: int
) -> None:
    sizes, in_features = [count * num_ranks * unit for count in units], in_units * num_ranks
    names = [f"part{index}" for index in range(len(units))]
    checkpoint = {f"{name}.weight": torch.randn(size, in_features) for name, size in zip(names, sizes, strict=True)}
    checkpoint |= {f"{name}.bias": torch.randn(size) for name, size in zip(names, sizes, strict=True)}
    ranks = []
    for context in contexts(num_ranks):
        context.linear(names, in_features, sizes, bias=True, split=split, unit=unit)  # type: ignore[arg-type]
        ranks.append({name: context.parameter(name) for name in checkpoint})
        for name, tensor in checkpoint.items():
            context.load(name, tensor)
    for name, tensor in checkpoint.items():
        kept = [parameters[name].part(name) for parameters in ranks]
        assert torch.equal(ranks[0][name].shards[name].join(kept), tensor)


@given(vocab_size=st.integers(1, 50), num_ranks=st.integers(1, 6))
def test_a_vocabulary_that_ranks_do_not_divide_is_padded_and_joined_whole(vocab_size: int, num_ranks: int) -> None:
    table = torch.randn(vocab_size, 3)
    ranks = []
    for context in contexts(num_ranks):
        context.output_head("head", vocab_size, 3)
        ranks.append(context.parameter("head.weight"))
        context.load("head.weight", table)
    kept = [parameter.tensor for parameter in ranks]
    assert len({tensor.shape for tensor in kept}) == 1
    assert torch.equal(ranks[0].shards["head.weight"].join(kept), table)
