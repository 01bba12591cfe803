"""The group `cacheflow.logits_processors`: what changes logits before a token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cacheflow.types import SamplingParams

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class ProcessorContext(Protocol):
    """What a processor may ask about the model. The tokenizer is loaded on first use, and only then."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def special_token_ids(self) -> frozenset[int]:
        """Ids that steer the model rather than being text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token id stands for."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorRow:
    """One row of logits that a processor is to change.

    Attributes:
        row: Its number in the logits.
        processor: What `from_params` made for the row's request.
        sequence_id: Unique in the engine's life: a key for state, which must be rebuildable from the token ids.
        prompt_token_ids: Of the request.
        output_token_ids: Generated so far.
    """

    row: int
    processor: Any
    sequence_id: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


class LogitsProcessor(Protocol):
    """Changes logits before a token is chosen. Processors run in the order of `priority`, highest first.

    A class may have `supports(config)`, the reasons why it can't be used here, for `cacheflow plugins`, and
    `EXAMPLES`, keyword arguments of `SamplingParams` that switch it on, for `cacheflow plugins check`.
    """

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]
    argmax_invariant: ClassVar[bool]
    """It never changes which token is the most likely one, so greedy rows skip it."""

    @classmethod
    def from_params(cls, params: SamplingParams, context: ProcessorContext) -> Self | None:
        """An instance for one request, or None when the request does not use this processor.

        Raises:
            InvalidRequestError: The parameters can't be honoured.
        """
        ...

    @classmethod
    def apply(cls, logits: torch.Tensor, rows: Sequence[ProcessorRow]) -> None:
        """Changes `logits [num_rows, vocab_size] float32` in place, in the given rows only."""
        ...
