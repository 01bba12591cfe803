"""What a check says: it passes, it fails with an explanation, or it does not apply here and says why.

Knows no plugin group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PASSED = "passed"
FAILED = "failed"
NOT_APPLICABLE = "not applicable"


class ConformanceFailure(AssertionError):
    """A plugin breaks its contract; the message says which sentence of it, and the numbers."""


class NotApplicable(Exception):
    """A check that can't say anything about this plugin on this machine."""


@dataclass(frozen=True)
class CheckResult:
    """The verdict of one check.

    Attributes:
        check: The check's name, such as "window_is_honoured".
        verdict: `PASSED`, `FAILED` or `NOT_APPLICABLE`.
        explanation: Why it did not pass; empty if it did.
    """

    check: str
    verdict: str
    explanation: str = ""


def expect(condition: Any, explanation: str) -> None:
    """Raises `ConformanceFailure` with `explanation` unless `condition` holds."""
    if not condition:
        raise ConformanceFailure(explanation)


def expect_reasons(reasons: Any) -> tuple[str, ...]:
    """Checks that `reasons` is what every `supports` answers with, a tuple of sentences, and returns it."""
    expect(isinstance(reasons, tuple), f"supports must return a tuple of reasons why not, got {type(reasons).__name__}")
    for reason in reasons:
        expect(isinstance(reason, str) and reason.strip(), f"supports must return sentences, got {reason!r} among {reasons!r}")
    return tuple(reasons)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS(out - reference) / RMS(reference), in float64."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    scale = reference.square().mean().sqrt().item()
    error = (out - reference).square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def error_limits() -> dict[torch.dtype, float]:
    """The largest `relative_error` that a correct operation shows, by dtype: a few roundings of its last bit."""
    import torch

    return {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def expect_close(out: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Fails unless `out` has the reference's shape and is within the dtype's limit of it."""
    expect(out.shape == reference.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(reference.shape)}")
    error, limit = relative_error(out, reference), error_limits()[dtype]
    expect(
        error <= limit,
        f"{what} in {str(dtype)[6:]}: RMS error relative to a float32 reference is {error:.2e}, limit {limit:.0e}",
    )
