"""Conformance of `cacheflow.logits_processors`: rows stay apart, state can be rebuilt, and greedy rows may be skipped if said.

The checks try the engine's own sampling parameters; a processor that reacts to `extra` names what it reacts to in an optional
class attribute `EXAMPLES`, a tuple of `SamplingParams`. Says nothing about whether the changes are useful.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cacheflow.config import EngineConfig
from cacheflow.conformance.verdict import NotApplicable, expect, expect_reasons
from cacheflow.interfaces import ProcessorRow
from cacheflow.types import SamplingParams

VOCAB_SIZE = 97

ORDINARY = (
    SamplingParams(min_tokens=4, max_tokens=8, stop_token_ids=[7]),
    SamplingParams(presence_penalty=0.7),
    SamplingParams(frequency_penalty=-1.1),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=0.7),
    SamplingParams(logit_bias={3: 5.0, 96: -100.0}),
    SamplingParams(allowed_token_ids=[1, 5, 8, 40]),
    SamplingParams(bad_words=["b", "cd", "efg"]),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1),
)
"""At least one of these asks for each built-in processor."""


class SmallContext:
    """A whole `ProcessorContext` of 97 tokens: a character's id is its code modulo 97."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (2,)

    def special_token_ids(self) -> frozenset[int]:
        """The end of text."""
        return frozenset(self.eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """One id per character."""
        return [ord(character) % VOCAB_SIZE for character in text]

    def token_bytes(self) -> list[bytes]:
        """The printable character of each id."""
        return [bytes([32 + token % 95]) for token in range(VOCAB_SIZE)]


def _examples(plugin: Any) -> list[tuple[SamplingParams, Any]]:
    """The parameters that this processor reacts to, each with its instance."""
    reasons = expect_reasons(plugin.supports(EngineConfig())) if hasattr(plugin, "supports") else ()
    if reasons:
        raise NotApplicable("; ".join(reasons))
    context = SmallContext()
    found = []
    for params in (*ORDINARY, *getattr(plugin, "EXAMPLES", ())):
        instance = plugin.from_params(params, context)
        if instance is not None:
            found.append((params, instance))
    if not found:
        raise NotApplicable("it reacts to none of the engine's own parameters; name some that it does react to in EXAMPLES")
    return found


def _logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def _row(row: int, instance: Any, output: Sequence[int], sequence_id: int = 11) -> ProcessorRow:
    prompt = [5, 9, 2, 9, 30]
    return ProcessorRow(
        row=row, processor=instance, sequence_id=sequence_id, prompt_token_ids=prompt, output_token_ids=list(output)
    )


OUTPUTS: tuple[tuple[int, ...], ...] = ((), (1,), (9, 9), (3, 1, 2, 3, 8), tuple(range(20)), (2, 2), (4, 5))


def check_default_params_do_not_use_it(plugin: Any, name: str) -> None:
    """A request that asks for nothing gets no instance, so that it costs nothing."""
    instance = plugin.from_params(SamplingParams(), SmallContext())
    expect(instance is None, f"from_params(SamplingParams()) must be None, got {instance!r}")


def check_only_given_rows_change(plugin: Any, name: str) -> None:
    """`apply` writes in place, in the rows that it is given and in no other, and leaves no NaN."""
    for params, instance in _examples(plugin):
        logits = _logits(6)
        before = logits.clone()
        given = (1, 4)
        plugin.apply(logits, [_row(row, instance, OUTPUTS[i], sequence_id=i) for i, row in enumerate(given)])
        for row in set(range(6)) - set(given):
            expect(torch.equal(logits[row], before[row]), f"row {row} changed, given were {given}, with {params}")
        expect(not logits.isnan().any(), f"NaN among the logits with {params}")
        for row in given:
            expect(bool((logits[row] > -torch.inf).any()), f"row {row}: no token is left to choose with {params}")


def check_rows_do_not_depend_on_each_other(plugin: Any, name: str) -> None:
    """A row changes alike alone and in a batch of rows with other parameters."""
    examples = _examples(plugin)
    rows = [(instance, OUTPUTS[i % len(OUTPUTS)]) for i, (_, instance) in enumerate(examples * 2)]
    together = _logits(len(rows))
    alone = together.clone()
    plugin.apply(together, [_row(i, instance, output, sequence_id=i) for i, (instance, output) in enumerate(rows)])
    for i, (instance, output) in enumerate(rows):
        single = alone[i : i + 1].clone()
        plugin.apply(single, [_row(0, instance, output, sequence_id=1000 + i)])
        expect(torch.allclose(single[0], together[i]), f"row {i} differs alone and in a batch of {len(rows)} rows")


def check_state_is_rebuilt_from_token_ids(plugin: Any, name: str) -> None:
    """An instance that saw every step and a fresh one that sees only the last give the same logits."""
    output = [9, 1, 4, 4, 2, 60, 9, 3, 33, 12]
    for params, instance in _examples(plugin):
        for length in range(len(output) + 1):
            through = _logits(1, seed=length)
            afresh = through.clone()
            plugin.apply(through, [_row(0, instance, output[:length])])
            fresh = plugin.from_params(params, SmallContext())
            plugin.apply(afresh, [_row(0, fresh, output[:length], sequence_id=12 + length)])
            expect(torch.allclose(through, afresh), f"after {length} tokens a fresh instance gives other logits, with {params}")


def check_sequences_of_one_request_stay_apart(plugin: Any, name: str) -> None:
    """Two sequences that share one instance, as under `n` = 2, each see only their own tokens."""
    for params, instance in _examples(plugin):
        for length in range(4):
            outputs = ((9, 1, 4, 4)[:length], (30, 2, 5, 7)[:length])
            shared = _logits(2, seed=length)
            expected = shared.clone()
            plugin.apply(shared, [_row(i, instance, output, sequence_id=20 + i) for i, output in enumerate(outputs)])
            for i, output in enumerate(outputs):
                plugin.apply(
                    expected[i : i + 1], [_row(0, plugin.from_params(params, SmallContext()), output, sequence_id=40 + i)]
                )
            expect(torch.allclose(shared, expected), f"two sequences of one request influence each other, with {params}")


def check_argmax_invariant_is_honest(plugin: Any, name: str) -> None:
    """A processor that calls itself `argmax_invariant` never changes which token is the most likely one."""
    invariant = plugin.argmax_invariant
    expect(isinstance(invariant, bool), f"argmax_invariant must be true or false, got {invariant!r}")
    if not invariant:
        return
    for params, instance in _examples(plugin):
        for seed, output in enumerate(OUTPUTS):
            logits = _logits(8, seed)
            before = logits.argmax(dim=-1)
            plugin.apply(logits, [_row(row, instance, output, sequence_id=row) for row in range(8)])
            expect(torch.equal(logits.argmax(dim=-1), before), f"the most likely token changed with {params}")


CHECKS = (
    check_default_params_do_not_use_it,
    check_only_given_rows_change,
    check_rows_do_not_depend_on_each_other,
    check_state_is_rebuilt_from_token_ids,
    check_sequences_of_one_request_stay_apart,
    check_argmax_invariant_is_honest,
)
