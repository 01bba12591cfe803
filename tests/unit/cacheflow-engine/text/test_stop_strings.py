from __future__ import annotations

import pytest

from cacheflow.text import StopFinder, StopMatch


def test_a_stop_string_is_found_inside_a_longer_part():
    assert StopFinder(("stop",)).feed("please stop here") == StopMatch("stop", 11)


def test_a_stop_string_is_found_across_parts():
    finder = StopFinder(("\n\nQ:",))
    assert finder.feed("A: yes\n") is None
    assert finder.num_held == 1
    assert finder.feed("\nQ") is None
    assert finder.num_held == 3
    assert finder.feed(": no") == StopMatch("\n\nQ:", 1)


def test_what_can_no_longer_become_a_stop_string_is_not_held():
    finder = StopFinder(("aab",))
    held = []
    for char in "aaac":
        assert finder.feed(char) is None
        held.append(finder.num_held)
    assert held == [1, 2, 2, 0]


@pytest.mark.parametrize("stops", [("bc", "abcd"), ("abcd", "bc")])
def test_the_occurrence_that_is_complete_first_counts(stops):
    assert StopFinder(stops).feed("abcd") == StopMatch("bc", 3)


@pytest.mark.parametrize("stops", [("c", "abc", "bc"), ("abc", "bc", "c"), ("bc", "c", "abc")])
def test_of_occurrences_with_one_end_the_longest_counts(stops):
    assert StopFinder(stops).feed("abc") == StopMatch("abc", 3)


def test_an_occurrence_inside_another_beginning_is_found():
    finder = StopFinder(("abcx", "bcd"))
    assert finder.feed("abc") is None
    assert finder.feed("d") == StopMatch("bcd", 1)


def test_the_largest_set_of_stop_strings_allowed_is_searched_at_once():
    stops = tuple("a" * 255 + chr(0x4E00 + number) for number in range(16))
    finder = StopFinder(stops)
    assert finder.feed("a" * 10_000) is None
    assert finder.num_held == 255
    assert finder.feed("b") is None
    assert finder.num_held == 0
    assert finder.feed("a" * 300 + stops[9][-1]) == StopMatch(stops[9], 301)
