"""Ends the process when a step hangs, so that its supervisor can start another one. It knows no step, only time."""

from __future__ import annotations

import faulthandler
import time

MAX_LATENESS_S = 1.0
"""How much later than the limit it may act, or a tenth of that if it is less: renewing costs a thread, so some are skipped."""


class Watchdog:
    """Ends the process with exit code 1, and all threads' stacks on stderr, unless it is renewed in time.

    It is a thread of C's, so it also acts when Python's threads can't. Time in which the machine sleeps does not count.

    Args:
        timeout_s: The limit; 0: it never acts.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lateness_s = min(0.1 * timeout_s, MAX_LATENESS_S)
        self._renewed_s: float | None = None

    def renew(self) -> None:
        """What may hang begins now."""
        now_s = time.monotonic()
        if self._timeout_s and (self._renewed_s is None or now_s - self._renewed_s > self._lateness_s):
            faulthandler.dump_traceback_later(self._timeout_s + self._lateness_s, exit=True)
            self._renewed_s = now_s

    def rest(self) -> None:
        """Nothing runs that could hang."""
        if self._renewed_s is not None:
            faulthandler.cancel_dump_traceback_later()
            self._renewed_s = None
