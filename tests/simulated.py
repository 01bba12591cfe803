"""An executor without a model: it keeps token ids where a real one keeps keys and values.

Each slot of its paged memory holds (position, token id). A sequence's next token is a function of what its block table leads
to, so a wrong table, a missed copy or a stale shared block changes the tokens that come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha512

from cacheflow.config import EngineConfig
from cacheflow.interfaces import AttentionSpec, Capacity, ModelSpec, Sample, SampleSpec, Step, StepOutput
from cacheflow.types import ModelInfo, TokenizerData

VOCAB_SIZE = 50
EOS = 7


def next_scores(context: Sequence[int], salt: int = 0) -> list[float]:
    """Log-probability-like scores of every token id after `context`: all different, and the same every time."""
    noise = sha512(bytes([salt, *context])).digest()
    return [-(noise[token] + token / VOCAB_SIZE) / 32 for token in range(VOCAB_SIZE)]


def next_token(context: Sequence[int], salt: int = 0) -> int:
    """The most likely token."""
    scores = next_scores(context, salt)
    return max(range(VOCAB_SIZE), key=lambda token: scores[token])


@dataclass
class Result:
    output: StepOutput | Exception

    def result(self) -> StepOutput:
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


@dataclass
class SimulatedExecutor:
    """Runs steps on paged memory of token ids, and checks each step's shape.

    Attributes:
        num_blocks: Size of the memory.
        block_size: Slots of a block.
        max_num_batched_tokens: No step may have more.
        poison: Requests whose prompt starts with this token make their step fail, after half of it was written.
        max_model_len: Of the pretended model.
    """

    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    poison: int = -1
    max_model_len: int = 256
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)
    num_steps: int = 0

    def start(self, config: EngineConfig) -> Capacity:
        spec = ModelSpec(
            attention=(AttentionSpec(layer=0, scale=1.0),),
            num_heads=1,
            num_kv_heads=1,
            head_size=1,
            hidden_size=1,
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
        )
        info = ModelInfo(
            model="simulated",
            architecture="Simulated",
            dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            tokenizer=TokenizerData(tokenizer_json="{}", eos_token_ids=[EOS]),
            engine_version="0",
        )
        return Capacity(num_blocks=self.num_blocks, spec=spec, info=info)

    def submit(self, step: Step) -> Result:
        self.num_steps += 1
        assert sum(len(s.token_ids) for s in step.sequences) <= self.max_num_batched_tokens
        sources = {d: [self.memory.get(s * self.block_size + i) for i in range(self.block_size)] for s, d in step.copies}
        for destination, content in sources.items():
            for i, value in enumerate(content):
                if value is not None:
                    self.memory[destination * self.block_size + i] = value
        written: set[int] = set()
        for n, sequence in enumerate(step.sequences):
            assert sequence.token_ids
            for offset, token in enumerate(sequence.token_ids):
                position = sequence.num_computed_tokens + offset
                slot = sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size
                assert slot not in written, "two tokens of a step are stored in one slot"
                written.add(slot)
                self.memory[slot] = (position, token)
            if self._is_poisoned(sequence.samples) and 2 * n >= len(step.sequences) - 1:
                return Result(RuntimeError("poison"))
        samples = []
        for sequence in step.sequences:
            length = sequence.num_computed_tokens + len(sequence.token_ids)
            context = []
            for position in range(length):
                slot = sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size
                stored = self.memory.get(slot)
                assert stored is not None and stored[0] == position, (
                    f"position {position} was never stored where the table says"
                )
                context.append(stored[1])
            samples.append([self._sample(context, spec) for spec in sequence.samples])
        if any(self._is_poisoned(s.samples) for s in step.sequences):
            return Result(RuntimeError("poison"))
        prompt_logprobs = [
            None
            if s.num_prompt_logprobs is None
            else [{t: -float(s.num_computed_tokens + i + 1)} for i, t in enumerate(s.scored_token_ids)]
            for s in step.sequences
        ]
        pooled = [[1.0] if s.pooling is not None else None for s in step.sequences]
        return Result(StepOutput(samples=samples, prompt_logprobs=prompt_logprobs, pooled=pooled))

    def check(self) -> None: ...

    def close(self) -> None: ...

    def _is_poisoned(self, specs: Sequence[SampleSpec]) -> bool:
        return any(spec.prompt_token_ids[0] == self.poison for spec in specs)

    def _sample(self, context: list[int], spec: SampleSpec) -> Sample:
        assert context == [*spec.prompt_token_ids, *spec.output_token_ids], "the cache holds other tokens than the sequence"
        salt = 0 if spec.num_candidates else spec.index
        scores = next_scores(context, salt)
        if not spec.num_candidates:
            token = next_token(context, salt)
            return Sample(token_ids=[token], scores=[scores[token]], logprobs=[scores[token]])
        best = sorted(range(VOCAB_SIZE), key=lambda t: -scores[t])[: spec.num_candidates]
        chosen = [scores[t] for t in best]
        return Sample(token_ids=best, scores=chosen, logprobs=chosen)
