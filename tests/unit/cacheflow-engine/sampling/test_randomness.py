"""The random numbers: uniform, unrelated between neighbours, and a function of their own coordinates alone."""

from __future__ import annotations

import numpy as np
import pytest

from cacheflow.sampling.randomness import uniform

SIZE = 50_000


def _line(name: str) -> np.ndarray:
    """Numbers along one coordinate, the others fixed."""
    coordinates = {"seed": [7] * SIZE, "index": [0] * SIZE, "position": [3] * SIZE, name: list(range(SIZE))}
    return uniform(coordinates["seed"], coordinates["index"], coordinates["position"])


@pytest.mark.parametrize("name", ["seed", "index", "position"])
def test_numbers_along_each_coordinate_are_uniform(name: str) -> None:
    numbers = _line(name)
    assert 0 <= numbers.min() and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    # Chi-square with 99 degrees of freedom exceeds 161 once in 10,000 draws.
    assert ((counts - SIZE / 100) ** 2 / (SIZE / 100)).sum() < 161


@pytest.mark.parametrize("name", ["seed", "index", "position"])
def test_neighbours_are_unrelated(name: str) -> None:
    numbers = _line(name)
    for distance in (1, 2, 64):
        assert abs(np.corrcoef(numbers[:-distance], numbers[distance:])[0, 1]) < 4 / np.sqrt(SIZE)


def test_coordinates_are_not_interchangeable() -> None:
    assert len({float(uniform([a], [b], [c])[0]) for a, b, c in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (3, 2, 1), (0, 0, 0)]}) == 5


def test_a_number_does_not_depend_on_its_batch() -> None:
    seeds, indices, positions = [5, 2**63 - 1, 0], [0, 127, 1], [0, 9, 131_071]
    together = uniform(seeds, indices, positions)
    alone = [uniform([s], [i], [p])[0] for s, i, p in zip(seeds, indices, positions, strict=True)]
    assert together.tolist() == alone


def test_numbers_never_change_between_versions() -> None:
    # A request that is sent again after a restart, perhaps of a newer engine, must go on as it began.
    assert uniform([0, 42], [0, 1], [0, 7]).tolist() == [0.13870941014555427, 0.10584086659863745]
