"""The built-in scheduling policies: who is served first, who loses its blocks, how much of a prompt at a time."""

from __future__ import annotations

from typing import ClassVar

from cacheflow.interfaces import RequestView

MAX_REMEMBERED = 4096
"""Clients, and requests, whose round `Fair` remembers before it forgets rounds that are over; a client gains a turn by that at
most."""


class FCFS:
    """First come, first served; the latest arrival is preempted first. Nobody starves."""

    CONTRACT_VERSION: ClassVar[int] = 1

    def key(self, view: RequestView) -> tuple[float, int]:
        """By arrival."""
        return (view.arrival_s, view.arrival_index)

    def victim_key(self, view: RequestView) -> tuple[float, int]:
        """The latest."""
        return (view.arrival_s, view.arrival_index)

    def chunk(self, view: RequestView, budget: int) -> int:
        """All that the budget leaves."""
        return budget


class Priority:
    """Smaller `priority` first, then by arrival. A steady stream of urgent requests can starve the others."""

    CONTRACT_VERSION: ClassVar[int] = 1

    def key(self, view: RequestView) -> tuple[int, float, int]:
        """By priority, then arrival."""
        return (view.priority, view.arrival_s, view.arrival_index)

    def victim_key(self, view: RequestView) -> tuple[int, float, int]:
        """The least urgent, of those the latest."""
        return (view.priority, view.arrival_s, view.arrival_index)

    def chunk(self, view: RequestView, budget: int) -> int:
        """All that the budget leaves."""
        return budget


class Fair:
    """Clients take turns: a client's k-th unserved request comes after every other client's (k-1)-th.

    Each request gets the number of a round on arrival: behind its client's last one, and no less than the round now being
    served, so that a client that was away gains no credit (start-time fair queueing, Goyal et al., SIGCOMM '96, with one
    sequence as the unit: a request for n of them takes n turns).
    """

    CONTRACT_VERSION: ClassVar[int] = 1

    def __init__(self) -> None:
        self._round = 0
        self._last_round: dict[str, int] = {}
        self._round_of: dict[int, int] = {}
        self._most_remembered = MAX_REMEMBERED

    def key(self, view: RequestView) -> tuple[int, float, int]:
        """By round, then arrival."""
        if max(len(self._last_round), len(self._round_of)) >= self._most_remembered:
            self._forget_rounds_below(self._round + 1)
            # All of them may be needed still: forgetting is tried again when there are twice as many, not at each arrival.
            self._most_remembered = max(MAX_REMEMBERED, 2 * len(self._last_round), 2 * len(self._round_of))
        turn = max(self._round, self._last_round.get(view.client_id, -1) + 1)
        self._last_round[view.client_id] = turn + view.num_sequences - 1
        self._round_of[view.arrival_index] = turn
        return (turn, view.arrival_s, view.arrival_index)

    def victim_key(self, view: RequestView) -> tuple[float, int]:
        """The latest."""
        return (view.arrival_s, view.arrival_index)

    def chunk(self, view: RequestView, budget: int) -> int:
        """All that the budget leaves. A request's first chunk tells which round is being served."""
        turn = self._round_of.pop(view.arrival_index, self._round)
        if turn > self._round:
            self._round = turn
            self._forget_rounds_below(turn)
        return budget

    def _forget_rounds_below(self, turn: int) -> None:
        self._last_round = {client: last for client, last in self._last_round.items() if last >= turn}
        self._round_of = {index: r for index, r in self._round_of.items() if r >= turn}
