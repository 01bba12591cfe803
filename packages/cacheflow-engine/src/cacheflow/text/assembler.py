"""From the engine's updates of one request to the outputs its user sees: everything so far, stop strings obeyed.

It knows token ids, text and the request's parameters; neither the engine nor how updates reach it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cacheflow.text.sequence_assembler import SequenceAssembler
from cacheflow.text.tokenizer import Tokenizer
from cacheflow.types import FINISH_ABORT, FINISH_ERROR, CompletionOutput, EngineRequest, Logprobs, RequestOutput, RequestUpdate


class RequestAssembler:
    """Assembles the outputs of one request.

    While it runs, an output has the request's `n` sequences in the order of their indices, each with the text that is certain
    and exactly the tokens of that text. It has none where only the end shows which sequences are returned: with `best_of`
    above `n`, and under beam search. A finished output has `n` sequences: with `best_of` above `n` those of the highest mean
    log probability per token, best first; under beam search the first ones in the engine's order; otherwise all, in the order
    of their indices, so that streams keep their places.

    Args:
        tokenizer: The model's.
        request: As it was given to the engine.
        prompt: Its text, or None when it was given as token ids.
    """

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest, prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._prompt = prompt
        params = request.params
        self._has_running_outputs = params.num_sequences == params.n and not params.use_beam_search
        self._sequences = [] if params.use_beam_search else [self._new_sequence() for _ in range(params.num_sequences)]
        # What has been given out, by index, as long as it holds.
        self._outputs: dict[int, CompletionOutput] = {}
        self._prompt_logprobs: list[Logprobs | None] | None = None if params.prompt_logprobs is None else []
        self._num_cached_tokens = 0
        self._error: str | None = None
        self._stopped: list[int] = []
        self.finished = False
        """Whether the output is the last one: nothing that comes later changes it."""

    def apply(self, update: RequestUpdate) -> RequestOutput:
        """Takes an update and says what there is now: `add`, then `output`."""
        self.add(update)
        return self.output()

    def add(self, update: RequestUpdate) -> None:
        """Takes an update. Its cost does not grow with what came before, as that of `output` does."""
        if self.finished:
            return
        if self._prompt_logprobs is not None and update.new_prompt_logprobs:
            # A new list: the old one may be part of an output.
            self._prompt_logprobs = self._prompt_logprobs + update.new_prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, update.num_cached_tokens)
        self._error = update.error
        if self._request.params.use_beam_search:
            self._add_beams(update)
        else:
            self._add_sequences(update)
        ended = update.finished or update.error is not None
        if ended:
            for sequence in self._sequences:
                sequence.finish(FINISH_ABORT if update.error is None else FINISH_ERROR)
            self._outputs.clear()
        self.finished = ended or (bool(self._sequences) and all(s.finish_reason is not None for s in self._sequences))

    def take_stopped(self) -> list[int]:
        """Indices of sequences that a stop string has ended since the last call, while the engine goes on with them."""
        stopped, self._stopped = self._stopped, []
        return stopped

    def output(self) -> RequestOutput:
        """All there is so far."""
        outputs: list[CompletionOutput] = []
        if self.finished:
            outputs = self._final_outputs()
        elif self._has_running_outputs:
            outputs = self._all_outputs()
        return RequestOutput(
            request_id=self._request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._request.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=sum(sequence.num_tokens for sequence in self._sequences),
            error=self._error,
        )

    def _new_sequence(self) -> SequenceAssembler:
        params = self._request.params
        detokenizer = self._tokenizer.detokenizer(params.skip_special_tokens, context=self._request.prompt_token_ids)
        return SequenceAssembler(detokenizer, params)

    def _add_sequences(self, update: RequestUpdate) -> None:
        for change in update.sequences:
            sequence = self._sequences[change.index]
            if sequence.finish_reason is not None:
                continue
            sequence.extend(change)
            self._outputs.pop(change.index, None)
            if sequence.met_stop_string and change.finish_reason is None and not update.finished:
                self._stopped.append(change.index)

    def _add_beams(self, update: RequestUpdate) -> None:
        """Beams come whole, and their order is what counts."""
        for change in update.sequences:
            sequence = self._new_sequence()
            sequence.extend(change)
            self._sequences.append(sequence)
        if update.error is not None:
            self._sequences += [self._new_sequence() for _ in range(self._request.params.n - len(self._sequences))]

    def _all_outputs(self) -> list[CompletionOutput]:
        outputs = []
        for index, sequence in enumerate(self._sequences):
            output = self._outputs.get(index)
            if output is None:
                output = self._outputs[index] = sequence.output(index)
            outputs.append(output)
        return outputs

    def _final_outputs(self) -> list[CompletionOutput]:
        params = self._request.params
        outputs = self._all_outputs()
        if params.num_sequences == params.n or params.use_beam_search:
            return outputs[: params.n]
        best = sorted(outputs, key=_mean_logprob, reverse=True)[: params.n]
        return [replace(output, index=rank) for rank, output in enumerate(best)]


def _mean_logprob(output: CompletionOutput) -> float:
    return output.cumulative_logprob / len(output.token_ids) if output.token_ids else -math.inf
