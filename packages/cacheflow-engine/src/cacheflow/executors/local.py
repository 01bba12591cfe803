"""The executor that runs steps in the calling thread, on one device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cacheflow.errors import EngineDeadError, OutOfMemoryError

if TYPE_CHECKING:
    from cacheflow.config import EngineConfig
    from cacheflow.interfaces import Capacity, Step, StepOutput
    from cacheflow.worker.runner import Launched, Runner

SPIN_COUNT = "5000"
"""GOMP_SPINCOUNT, unless the user sets it: how often a thread that waits for the others looks before it sleeps. One stream
beside a process that took one of two cores: 25 tokens/s with it, 14 with the library's 300,000, 36 with 1,000; alone 84, 80 and
61."""


@dataclass(frozen=True)
class Submitted:
    """A step that was launched, or whose launch failed."""

    launched: Launched | None = None
    error: Exception | None = None

    def result(self) -> StepOutput:
        """Waits for what was launched; raises what went wrong."""
        if self.error is not None:
            raise self.error
        assert self.launched is not None
        try:
            return self.launched.result()
        except Exception as error:
            raise _named(error) from error


class LocalExecutor:
    """One process, one device. On a GPU steps are launched, and the next may be while one runs."""

    CONTRACT_VERSION: ClassVar[int] = 1
    priority: ClassVar[int] = 0

    @classmethod
    def supports(cls, config: EngineConfig) -> tuple[str, ...]:
        """Everything on one device."""
        reasons = []
        for flag, size in (
            ("--tensor-parallel-size", config.tensor_parallel_size),
            ("--pipeline-parallel-size", config.pipeline_parallel_size),
        ):
            if size != 1:
                reasons.append(f"{flag} is {size}, it drives one device")
        if config.swap_space and _runs_on_cuda(config):
            reasons.append(f"--swap-space is {config.swap_space:g} GiB, it has no host tier beside a GPU")
        return tuple(reasons)

    def __init__(self) -> None:
        self._runner: Runner | None = None

    def start(self, config: EngineConfig) -> Capacity:
        """Loads the model here."""
        # The OpenMP library reads it when torch is loaded, so that it does nothing where torch is there already.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        from cacheflow.worker.runner import Runner

        self._runner = Runner(config)
        return self._runner.capacity

    def submit(self, step: Step) -> Submitted:
        """Launches the step; on a CPU that runs it."""
        if self._runner is None:
            raise EngineDeadError("The executor is closed or was never started.")
        try:
            return Submitted(launched=self._runner.launch(step))
        except Exception as error:
            return Submitted(error=_named(error))

    def can_follow(self, step: Step) -> bool:
        """On a GPU, unless a logits processor waits for the tokens."""
        return self._runner is not None and self._runner.can_follow(step)

    def check(self) -> None:
        """Asks the device, which may be gone behind an error that looks like a request's."""
        if self._runner is None:
            raise EngineDeadError("The executor is closed or was never started.")
        self._runner.check()

    def close(self) -> None:
        """Lets go of weights and cache."""
        self._runner = None


def _named(error: Exception) -> Exception:
    """The error, under its own name if memory ran out."""
    import torch

    is_host = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    is_device = isinstance(error, torch.OutOfMemoryError)
    if is_device:
        torch.cuda.empty_cache()  # What is left over in pieces may be enough for a smaller step.
    return OutOfMemoryError(str(error)) if is_host or is_device else error


def _runs_on_cuda(config: EngineConfig) -> bool:
    if config.device == "auto":
        import torch

        return torch.cuda.is_available()
    return config.device == "cuda"
