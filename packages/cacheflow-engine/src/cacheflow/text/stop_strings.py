"""Finding the first of several stop strings in a text that arrives in parts, and how much of its end might begin one.

*First* is the occurrence that is complete first; of those that end at the same character, the one that starts first (the
longest), so that nothing of it is left in the text. This depends on the characters alone, never on how they are cut into
tokens or updates. All strings are looked for at once (Aho and Corasick, CACM 18(6), 1975): one dictionary look-up a
character, however many and long they are. It knows neither tokens nor requests.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string that was met.

    Attributes:
        stop: The string.
        end: How many characters of the part given last belong to the text up to its end.
    """

    stop: str
    end: int


class _Automaton:
    """Its states are the beginnings of stop strings, the empty one being state 0: the longest that the text ends with."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.next_state: list[dict[str, int]] = [{}]
        self.length: list[int] = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self.first_characters = frozenset(self.next_state[0])
        self._link()

    def move(self, state: int, char: str) -> int:
        return self.next_state[state].get(char) or self.next_state[0].get(char, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.next_state[state]:
                self.next_state[state][char] = len(self.length)
                self.next_state.append({})
                self.length.append(self.length[state] + 1)
                self.match.append(None)
            state = self.next_state[state][char]
        self.match[state] = stop

    def _link(self) -> None:
        """Completes every state with the moves and the match of its longest proper ending that is a state too.

        The moves of state 0 are not copied: `move` falls back on them, and most states then have a single move.
        """
        level = [(state, 0) for state in self.next_state[0].values()]
        while level:
            following = []
            for state, ending in level:
                own = self.next_state[state]
                following += [(child, self.move(ending, char)) for char, child in own.items()]
                if ending:
                    self.next_state[state] = {**self.next_state[ending], **own}
                if self.match[state] is None:
                    self.match[state] = self.match[ending]
            level = following


# Requests mostly carry the same stop strings; building takes some milliseconds, and a megabyte, at the limits.
_automaton = lru_cache(maxsize=16)(_Automaton)


class StopFinder:
    """Looks for stop strings in one text, given in parts.

    Args:
        stops: At least one, none empty.
    """

    __slots__ = ("_automaton", "_state")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._automaton = _automaton(stops)
        self._state = 0

    @property
    def num_held(self) -> int:
        """How many of the last characters might be the beginning of a stop string."""
        return self._automaton.length[self._state]

    def feed(self, text: str) -> StopMatch | None:
        """Takes the next part. Once it has returned a match, the search is over."""
        automaton, state = self._automaton, self._state
        if not state and automaton.first_characters.isdisjoint(text):
            return None
        move, match = automaton.move, automaton.match
        for end, char in enumerate(text, 1):
            state = move(state, char)
            stop = match[state]
            if stop is not None:
                return StopMatch(stop, end)
        self._state = state
        return None
