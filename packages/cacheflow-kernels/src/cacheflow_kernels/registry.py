"""Which implementation of an operation runs: those that exist, why each can't run here, and the one that is taken.

It knows no operation: `ops` fills it. An implementation says for a (device, dtype) pair the *reasons why not*; none means yes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Supports = Callable[[torch.device, torch.dtype], tuple[str, ...]]
"""Asked once per (device, dtype): why an implementation can't serve it on this machine."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operation.

    Attributes:
        name: Such as "reference"; the same for all operations of a family.
        function: Takes the operation's arguments, already checked.
        supports: Its reasons why not.
        priority: Of several that can run, the highest is taken.
    """

    name: str
    function: Callable[..., Any]
    supports: Supports
    priority: int


class UnsupportedError(RuntimeError):
    """The implementation that was asked for can't run here, or none can; the message has every reason."""


class Registry:
    """Implementations by operation. A choice is made once per (operation, implementation, device, dtype) and remembered."""

    def __init__(self) -> None:
        self._implementations: dict[str, dict[str, Implementation]] = {}
        self._chosen: dict[tuple[str, str, torch.device, torch.dtype], Callable[..., Any]] = {}

    def add(self, op: str, implementation: Implementation) -> None:
        """Adds one.

        Raises:
            ValueError: The operation has one of that name.
        """
        named = self._implementations.setdefault(op, {})
        if implementation.name in named:
            raise ValueError(f"{op} has an implementation named {implementation.name!r} already.")
        named[implementation.name] = implementation
        self._chosen.clear()

    def ops(self) -> tuple[str, ...]:
        """The operations that have an implementation."""
        return tuple(self._implementations)

    def reasons(self, op: str, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
        """By implementation, the preferred first: why it can't run there; an empty tuple means that it can."""
        ordered = sorted(self._implementations[op].values(), key=lambda i: (-i.priority, i.name))
        return {i.name: i.supports(device, dtype) for i in ordered}

    def select(self, op: str, name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        """The function to call: the named implementation's, or under "auto" the preferred one's.

        Raises:
            UnsupportedError: It doesn't exist or can't run there.
        """
        key = (op, name, device, dtype)
        if key not in self._chosen:
            self._chosen[key] = self._choose(op, name, device, dtype)
        return self._chosen[key]

    def _choose(self, op: str, name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        known = self._implementations[op]
        if name != "auto" and name not in known:
            raise UnsupportedError(f"{op} has no implementation {name!r}. There are: {', '.join(known)}.")
        reasons = self.reasons(op, device, dtype)
        for candidate, why_not in reasons.items():
            if name in ("auto", candidate) and not why_not:
                return known[candidate].function
        asked = reasons if name == "auto" else {name: reasons[name]}
        listed = "; ".join(f"{candidate}: {', '.join(why_not)}" for candidate, why_not in asked.items())
        raise UnsupportedError(f"{op} can't run on {device} in {dtype}: {listed}.")
