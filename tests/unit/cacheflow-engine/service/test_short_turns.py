"""Which turns on the processor threads ask the system for."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading

import pytest

from cacheflow.service.short_turns import SHORT_TURN_NS, short_turns, take_short_turns, take_usual_turns


def _turn_ns() -> int:
    """Of the calling thread, as the system has it."""
    attributes = ctypes.create_string_buffer(56)
    ctypes.CDLL(None).syscall({"x86_64": 315, "aarch64": 275}[platform.machine()], 0, attributes, 56, 0)
    return int(struct.unpack("=IIQiIQQQII", attributes.raw)[5])


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in platform.release().split("-")[0].split(".")[:2] if number.isdigit())


pytestmark = pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() not in ("x86_64", "aarch64")
    or _version() < (6, 12)
    or os.sched_getscheduler(0) != os.SCHED_OTHER,
    reason="needs Linux 6.12 and its usual scheduling policy",
)


def test_a_thread_and_those_that_it_starts_take_short_turns_until_it_takes_usual_ones() -> None:
    found: list[int] = []

    def note() -> None:
        found.append(_turn_ns())

    def run() -> None:
        note()
        take_short_turns()
        note()
        other = threading.Thread(target=note)
        other.start()
        other.join()
        take_usual_turns()
        note()

    thread = threading.Thread(target=run)  # So that the thread of the other tests stays as it is.
    thread.start()
    thread.join()
    usual, short, started, usual_again = found
    assert short == started == SHORT_TURN_NS < usual == usual_again


def test_the_thread_that_starts_others_with_short_turns_goes_on_with_usual_ones() -> None:
    found: list[int] = []

    def run() -> None:
        with short_turns():
            found.append(_turn_ns())
        found.append(_turn_ns())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0] == SHORT_TURN_NS < found[1]
