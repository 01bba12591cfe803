"""Conformance of `cacheflow.schedulers`: keys that a heap can hold, and chunks within the budget.

Says nothing about whether a policy is fair or wise.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

from cacheflow.conformance.verdict import ConformanceFailure, expect
from cacheflow.interfaces import RequestView


def _views(count: int = 60) -> list[RequestView]:
    """Requests of four clients with all priorities and lengths mixed, in order of arrival."""
    draw = random.Random(0)
    return [
        RequestView(
            request_id=f"request-{index}",
            client_id=draw.choice(["", "alice", "bob", "carol"]),
            priority=draw.randint(-3, 3),
            arrival_s=1_700_000_000.0 + index // 3,
            arrival_index=index,
            num_prompt_tokens=draw.choice([1, 2, 15, 16, 17, 500, 4000]),
            num_output_tokens=draw.choice([0, 0, 0, 1, 20]),
            num_sequences=draw.choice([1, 1, 1, 2, 6]),
        )
        for index in range(count)
    ]


def _expect_comparable(keys: list[Any], what: str) -> None:
    try:
        in_order = sorted(keys)
    except TypeError as error:
        raise ConformanceFailure(f"{what} of different requests must be comparable with one another: {error}") from error
    for smaller, larger in pairwise(in_order):
        expect(not larger < smaller, f"{what}: {larger!r} sorts after {smaller!r} and yet is below it; is one of them NaN?")


def check_keys_are_comparable(plugin: Any, name: str) -> None:
    """The keys of any two requests can be compared, so that they fit into one heap."""
    policy = plugin()
    _expect_comparable([policy.key(view) for view in _views()], f"{name}.key")


def check_victim_keys_are_comparable(plugin: Any, name: str) -> None:
    """The victim keys of any two running requests can be compared."""
    policy = plugin()
    views = _views()
    for view in views:
        policy.key(view)
    _expect_comparable([policy.victim_key(view) for view in views], f"{name}.victim_key")


def check_keys_are_stable(plugin: Any, name: str) -> None:
    """Two instances that see the same arrivals give the same keys: nothing depends on the clock, on ids or on chance."""
    views = _views()
    first, second = plugin(), plugin()
    for view in views:
        one, other = first.key(view), second.key(view)
        expect(one == other, f"{name}.key differs between two instances for the same arrivals: {one!r} and {other!r}")
    for view in views:
        one, other = first.victim_key(view), second.victim_key(view)
        expect(one == other, f"{name}.victim_key differs between two instances for the same arrivals: {one!r} and {other!r}")


def check_chunk_is_within_the_budget(plugin: Any, name: str) -> None:
    """`chunk` gives at least one token, so that every request moves, and never more than the budget."""
    policy = plugin()
    for view in _views():
        policy.key(view)
        for budget in (1, 2, 16, 511, 2048):
            chunk = policy.chunk(view, budget)
            is_whole = isinstance(chunk, int) and not isinstance(chunk, bool)
            expect(is_whole, f"{name}.chunk must return a whole number, got {chunk!r}")
            expect(1 <= chunk <= budget, f"{name}.chunk must be from 1 to the budget {budget}, got {chunk}")


CHECKS = (
    check_keys_are_comparable,
    check_victim_keys_are_comparable,
    check_keys_are_stable,
    check_chunk_is_within_the_budget,
)
