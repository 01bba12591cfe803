"""Conformance of `cacheflow.executors`: a tiny model with random weights, from `start` to `close`.

The same tokens must come out however a prompt is cut into steps, and whatever shares the step. Says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cacheflow.conformance.tiny_model import CONFIG, VOCAB_SIZE, write_tiny_model
from cacheflow.conformance.verdict import NotApplicable, expect, expect_reasons
from cacheflow.interfaces import UNKNOWN_TOKEN, Capacity, Sample, SampleSpec, ScheduledSequence, Step, StepOutput
from cacheflow.types import SamplingParams

PROMPTS = ([72, 101, 108, 108, 111], list(range(1, 40)), [7])
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=8, logprobs=3)
NUM_TOKENS = 6


@contextmanager
def _started(plugin: Any, **options: Any) -> Iterator[tuple[Any, Capacity]]:
    """A running executor over the tiny model; closed in the end whatever happens."""
    with TemporaryDirectory() as folder:
        config = replace(write_tiny_model(Path(folder)), **options)
        reasons = expect_reasons(plugin.supports(config))
        if reasons:
            raise NotApplicable("; ".join(reasons))
        executor = plugin()
        try:
            yield executor, executor.start(config)
        finally:
            executor.close()


def _scheduled(
    index: int,
    tokens: Sequence[int],
    num_computed: int,
    blocks: Sequence[int],
    prompt: Sequence[int],
    output: Sequence[int] | None,
) -> ScheduledSequence:
    """One sequence's part of a step; `output` None: a chunk within the prompt, which chooses no token."""
    samples: tuple[SampleSpec, ...] = ()
    if output is not None:
        samples = (
            SampleSpec(
                sequence_id=index,
                request_index=index,
                index=0,
                params=GREEDY,
                prompt_token_ids=list(prompt),
                output_token_ids=list(output),
            ),
        )
    return ScheduledSequence(
        sequence_id=index, token_ids=list(tokens), num_computed_tokens=num_computed, block_table=list(blocks), samples=samples
    )


def _generate(
    executor: Any, prompts: Sequence[Sequence[int]], chunk: int, blocks_of: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Greedy tokens for prompts that run together, cut into chunks."""
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    while any(len(t) < len(p) + NUM_TOKENS for t, p in zip(tokens, prompts, strict=True)):
        parts, owners = [], []
        for i, prompt in enumerate(prompts):
            if len(tokens[i]) >= len(prompt) + NUM_TOKENS:
                continue
            new = tokens[i][computed[i] : computed[i] + chunk]
            is_last = computed[i] + len(new) == len(tokens[i])
            output = tokens[i][len(prompt) :] if is_last else None
            parts.append(_scheduled(i, new, computed[i], blocks_of[i], prompt, output))
            owners.append(i)
            computed[i] += len(new)
        out: StepOutput = executor.submit(Step(sequences=tuple(parts))).result()
        expect(len(out.samples) == len(parts), f"a step of {len(parts)} sequences gave samples for {len(out.samples)}")
        for i, part, samples in zip(owners, parts, out.samples, strict=True):
            expect(len(samples) == len(part.samples), f"{len(part.samples)} choices were asked for, {len(samples)} were made")
            for sample in samples:
                _expect_greedy(sample)
                tokens[i].append(sample.token_ids[0])
    return [t[len(p) :] for t, p in zip(tokens, prompts, strict=True)]


def _expect_greedy(sample: Sample) -> None:
    expect(len(sample.token_ids) == 1, f"one token was asked for, got {sample.token_ids}")
    token, logprob = sample.token_ids[0], sample.logprobs[0]
    expect(0 <= token < VOCAB_SIZE, f"token {token} is outside the vocabulary of {VOCAB_SIZE}")
    expect(logprob <= 0, f"a log probability of {logprob} is above 0")
    expect(sample.top_logprobs is not None, "logprobs were asked for, top_logprobs is None")
    top = (sample.top_logprobs or [{}])[0]
    expect(
        token in top and len(top) in (3, 4), f"3 top log probabilities and the chosen token {token} were asked for, got {top}"
    )
    expect(
        max(top.values()) <= logprob + 1e-5,
        f"temperature 0 chose token {token} at {logprob}, yet the best is {max(top.values())}",
    )


def _blocks(capacity: Capacity, count: int) -> list[list[int]]:
    """Four blocks of 16 slots for each of `count` sequences, taken alternately so that none lie side by side."""
    return [[i + j * count for j in range(4)] for i in range(count)]


def check_start_gives_the_capacity(plugin: Any, name: str) -> None:
    """`start` reports blocks and the model's numbers."""
    with _started(plugin) as (executor, capacity):
        expect(
            capacity.num_blocks >= 16, f"10 MiB of KV cache hold at least 16 blocks of this model, got {capacity.num_blocks}"
        )
        expect(
            capacity.spec.num_layers == CONFIG["num_hidden_layers"], f"the model has 2 layers, got {capacity.spec.num_layers}"
        )
        expect(
            capacity.info.vocab_size == VOCAB_SIZE, f"the vocabulary has {VOCAB_SIZE} tokens, got {capacity.info.vocab_size}"
        )
        expect(capacity.info.dtype == "float32", f"float32 was asked for, got {capacity.info.dtype}")
        executor.check()


def check_tokens_do_not_depend_on_the_steps(plugin: Any, name: str) -> None:
    """Greedy tokens are the same for whole prompts and chunks of 1, 3 and 7, alone and together."""
    with _started(plugin) as (executor, capacity):
        blocks = _blocks(capacity, len(PROMPTS))
        expected = [_generate(executor, [p], 64, [b])[0] for p, b in zip(PROMPTS, blocks, strict=True)]
        for chunk in (64, 1, 3, 7):
            got = _generate(executor, PROMPTS, chunk, blocks)
            expect(got == expected, f"in chunks of {chunk}, together: {got}; whole and alone: {expected}")


def check_copies_come_first(plugin: Any, name: str) -> None:
    """A step's copies are made before anything is written: a fork that goes on in copied blocks gives what its parent gives."""
    with _started(plugin) as (executor, _):
        prompt, blocks = PROMPTS[1], [0, 1, 2, 3]
        expected = _generate(executor, [prompt], 64, [blocks])[0]
        copied = [8, 1, 6, 5]
        step = Step(
            sequences=(_scheduled(9, prompt[-1:], len(prompt) - 1, copied, prompt, []),), copies=((0, 8), (2, 6), (3, 5))
        )
        token = executor.submit(step).result().samples[0][0].token_ids[0]
        expect(token == expected[0], f"a fork in copied blocks chose token {token}, its parent {expected[0]}")


def check_following_steps(plugin: Any, name: str) -> None:
    """A step submitted before the result of the one that it follows gives what it gives after it."""
    with _started(plugin, run_ahead="always") as (executor, _):
        prompt, blocks = PROMPTS[0], [0, 1, 2, 3]
        expected = _generate(executor, [prompt], 64, [blocks])[0]
        can_follow = getattr(executor, "can_follow", None)
        step = Step(sequences=(_scheduled(9, prompt, 0, blocks, prompt, []),))
        pending = executor.submit(step)
        if can_follow is None or not can_follow(step):
            raise NotApplicable("each step is waited for")
        tokens: list[int] = []
        for position in range(len(prompt), len(prompt) + NUM_TOKENS - 1):
            part = _scheduled(9, [UNKNOWN_TOKEN], position, blocks, prompt, list(tokens))
            part = replace(part, samples=tuple(replace(spec, num_unknown=1) for spec in part.samples))
            following = executor.submit(Step(sequences=(part,), follows=True))
            tokens += pending.result().samples[0][0].token_ids
            pending = following
        tokens += pending.result().samples[0][0].token_ids
        expect(tokens == expected, f"steps that follow one another chose {tokens}; each waited for: {expected}")


def check_candidates(plugin: Any, name: str) -> None:
    """`num_candidates` gives that many tokens, best first, as beam search asks for."""
    with _started(plugin) as (executor, _):
        prompt = PROMPTS[0]
        greedy = _generate(executor, [prompt], 64, [[0, 1, 2, 3]])[0][0]
        params = SamplingParams(use_beam_search=True, best_of=2, temperature=0.0, seed=0)
        spec = SampleSpec(
            sequence_id=3,
            request_index=3,
            index=0,
            params=params,
            prompt_token_ids=prompt,
            output_token_ids=[],
            num_candidates=4,
        )
        sequence = ScheduledSequence(
            sequence_id=3, token_ids=prompt, num_computed_tokens=0, block_table=[0, 1, 2, 3], samples=(spec,)
        )
        sample = executor.submit(Step(sequences=(sequence,))).result().samples[0][0]
        expect(len(set(sample.token_ids)) == 4, f"4 different candidates were asked for, got {sample.token_ids}")
        expect(
            sample.scores == sorted(sample.scores, reverse=True), f"candidates must come best first, got scores {sample.scores}"
        )
        expect(sample.token_ids[0] == greedy, f"the best candidate is {sample.token_ids[0]}, the greedy token {greedy}")


def check_prompt_logprobs(plugin: Any, name: str) -> None:
    """Scored positions give one entry each, in whole prompts as in chunks."""
    with _started(plugin) as (executor, _):
        prompt = PROMPTS[1]

        def score(size: int) -> list[float]:
            scores: list[float] = []
            for start in range(0, len(prompt), size):
                tokens, following = prompt[start : start + size], prompt[start + 1 : start + size + 1]
                sequence = ScheduledSequence(
                    sequence_id=4,
                    token_ids=tokens,
                    num_computed_tokens=start,
                    block_table=[0, 1, 2, 3],
                    num_prompt_logprobs=2,
                    scored_token_ids=following,
                )
                entries = executor.submit(Step(sequences=(sequence,))).result().prompt_logprobs[0] or []
                expect(len(entries) == len(following), f"{len(following)} positions were to be scored, {len(entries)} were")
                for token, entry in zip(following, entries, strict=True):
                    expect(token in entry, f"the entry of token {token} lacks the token itself: {entry}")
                    scores.append(entry[token])
            return scores

        whole = score(64)
        for size in (7, 3):
            worst = max(abs(a - b) for a, b in zip(whole, score(size), strict=True))
            expect(
                worst < 1e-3,
                f"prompt log probabilities in chunks of {size} differ by {worst:.1e} from those of the whole prompt",
            )


def check_close_may_be_called_twice(plugin: Any, name: str) -> None:
    """`close` after `close` does nothing, and before `start` neither."""
    plugin().close()
    with _started(plugin) as (executor, _):
        executor.close()


CHECKS = (
    check_start_gives_the_capacity,
    check_tokens_do_not_depend_on_the_steps,
    check_copies_come_first,
    check_following_steps,
    check_candidates,
    check_prompt_logprobs,
    check_close_may_be_called_twice,
)
