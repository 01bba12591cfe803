"""Short turns on the processor, for threads that work briefly and that somebody waits for: those that pass messages on.

The threads of a step take all cores. Who is told of a token meanwhile waits until the system takes a core from one of them,
which is up to 5 ms on two cores. A thread that has asked for short turns gets a core at once, as it is the one that will give
it back first; what each gets in all stays as fair as it was. Linux does so from 6.12 on; elsewhere nothing changes. It knows
neither messages nor steps.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SHORT_TURN_NS = 100_000
"""The least that Linux takes."""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number; the C library has no function for it."""


def take_short_turns() -> None:
    """For the calling thread, and for those and the processes that it starts from now on."""
    _take_turns(SHORT_TURN_NS)


def take_usual_turns() -> None:
    """As long as the system thinks fit; for whom as in `take_short_turns`."""
    _take_turns(0)


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads that are started inside take short turns; the calling thread takes usual ones behind it."""
    take_short_turns()
    try:
        yield
    finally:
        take_usual_turns()


def _take_turns(slice_ns: int) -> None:
    number = _SCHED_SETATTR.get(os.uname().machine) if sys.platform == "linux" else None
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return  # Somebody has given the process another policy, which is theirs to decide.
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period, and two of utilisation.
    size = struct.calcsize("=IIQiIQQQII")
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("=IIQiIQQQII", size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, attributes, 0)  # A system that refuses it goes on as it did.
