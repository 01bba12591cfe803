"""What a user gives to the engine and gets back, and what the two sides of it say to each other.

Plain frozen dataclasses, validated when they are made. This module knows no text processing, no torch and no sockets.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cacheflow.errors import CacheflowError, InvalidRequestError, RequestFailedError, shown

MAX_N = 128
"""Most sequences of one request: bounds what one client can make the engine hold."""
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_ALLOWED_TOKEN_IDS = 262_144
MAX_EXTRA_ENTRIES = 32
MAX_STRUCTURE_BYTES = 65_536
"""Of a JSON schema, a grammar, or all choices together, in UTF-8."""
MAX_REGEX_BYTES = 8_192
MAX_SCHEMA_DEPTH = 64
"""Objects and arrays within each other in a JSON schema."""
MAX_CHOICES = 1024

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"
FINISH_ERROR = "error"


def _check(name: str, value: Any, valid: bool, allowed: str) -> None:
    if not valid:
        raise InvalidRequestError(f"{name} must be {allowed}, got {shown(value)}.", param=name)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # No parameter is larger; and a whole number with hundreds of digits is not even comparable with a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 <= value <= 1e9


def _is_sequence(value: Any, max_items: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) <= max_items


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What the text of a request must be: exactly one of these. Needs `cacheflow-engine[structured]`.

    Attributes:
        json_schema: The text is JSON that the schema describes. A mapping or JSON text, at most 64 KiB and 64 levels deep; kept
            as text.
        regex: The whole text matches it, in the syntax of Rust's regex crate (no backreferences or look-around); at most 8 KiB.
        grammar: The text derives from `start` in this context-free grammar, in llguidance's variant of Lark; at most 64 KiB.
        choices: The text is one of these; 1 to 1,024 texts that are not empty, at most 64 KiB together.
        json_object: The text is any JSON object.

    Raises:
        InvalidRequestError: None or several are given, or one is too large or no valid JSON.
    """

    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        _check("json_object", self.json_object, isinstance(self.json_object, bool), "true or false")
        names = [f.name for f in fields(self) if getattr(self, f.name) is not None and getattr(self, f.name) is not False]
        _check("structured", names, len(names) == 1, f"exactly one of {', '.join(f.name for f in fields(self))}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _json_schema_text(self.json_schema))
        for name, max_bytes in (("regex", MAX_REGEX_BYTES), ("grammar", MAX_STRUCTURE_BYTES)):
            value = getattr(self, name)
            valid = value is None or (isinstance(value, str) and 1 <= _num_bytes(value) <= max_bytes)
            _check(name, value, valid, f"a text of 1 to {max_bytes} bytes")
        choices = self.choices
        if choices is not None:
            valid = _is_sequence(choices, MAX_CHOICES) and bool(choices) and all(isinstance(c, str) and c for c in choices)
            valid = valid and sum(map(_num_bytes, choices)) <= MAX_STRUCTURE_BYTES
            allowed = f"1 to {MAX_CHOICES} texts that are not empty, together at most {MAX_STRUCTURE_BYTES} bytes"
            _check("choices", choices, valid, allowed)
            object.__setattr__(self, "choices", tuple(choices))


def _num_bytes(text: str) -> int:
    """In UTF-8; a lone surrogate, which that can't carry, counts as too many."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return MAX_STRUCTURE_BYTES + 1


def _json_schema_text(schema: str | Mapping[str, Any]) -> str:
    """As text, its size and depth checked."""
    allowed = f"a JSON object of at most {MAX_STRUCTURE_BYTES} bytes, nested at most {MAX_SCHEMA_DEPTH} deep"
    try:
        if isinstance(schema, str):
            _check("json_schema", schema, _num_bytes(schema) <= MAX_STRUCTURE_BYTES, allowed)
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        document = json.loads(text)
        valid = isinstance(document, dict) and _num_bytes(text) <= MAX_STRUCTURE_BYTES and _depth(document) <= MAX_SCHEMA_DEPTH
    except (ValueError, TypeError, RecursionError):
        valid = False
    _check("json_schema", schema, valid, allowed)
    return text


def _depth(document: Any) -> int:
    """Objects and arrays within each other; the JSON parser has already refused what recursion can't reach."""
    if not isinstance(document, (dict, list)):
        return 0
    items = document.values() if isinstance(document, dict) else document
    return 1 + max(map(_depth, items), default=0)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when it ends.

    The names follow OpenAI's API where it has one, and the original CacheFlow otherwise. Log probabilities are *raw*: those
    of the model, before penalties, temperature and masks; `best_of` and `cumulative_logprob` use them too.

    Attributes:
        n: Sequences to return, 1 to 128.
        best_of: Sequences to generate, of which the best `n` by mean log probability per token are returned; the beam width
            under `use_beam_search`. None: `n`. `n` to 128.
        presence_penalty: Subtracted from the logit of every token that is already in the output, -2 to 2.
        frequency_penalty: Subtracted once per occurrence in the output, -2 to 2.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt and output (CTRL,
            arXiv:1909.05858); 0.01 to 10; 1 changes nothing.
        temperature: 0 to 100; 0 takes the most likely token, of equals the one with the lowest id, and ignores top_p, top_k
            and min_p.
        top_p: Nucleus: the smallest set of most likely tokens whose probabilities reach this; above 0, up to 1.
        top_k: The most likely tokens to choose from; -1 or 0 means all.
        min_p: Tokens less likely than this share of the most likely one are left out, 0 to 1.
        seed: 0 to 2**63 - 1. The tokens are a function of (model, prompt, parameters, seed), not of what else runs. None:
            drawn anew for each request.
        use_beam_search: Deterministic search of width `best_of`; needs temperature 0.
        length_penalty: Exponent of the length that a beam's log probability is divided by, -10 to 10.
        early_stopping: True: stop when `best_of` beams have finished; False: when no better one is likely; "never": when
            none is possible.
        stop: Up to 16 strings, at most 256 characters each, that end the text; not part of it unless
            `include_stop_str_in_output`.
        stop_token_ids: Up to 128 ids that end the sequence. Like the end-of-text token they stay in `token_ids` and out of
            `text`.
        include_stop_str_in_output: Keep the stop string that was met in the text.
        ignore_eos: Go on past the end-of-text token.
        max_tokens: Most tokens to generate; at least 1. None: what the context leaves.
        min_tokens: Tokens before which neither end-of-text, stop_token_ids nor stop strings count; 0 to max_tokens.
        logprobs: Also return this many most likely tokens per position, 0 to 20; the chosen token is always there. None: none.
        prompt_logprobs: The same for the prompt's tokens, 0 to 20.
        logit_bias: Token id to a value added to its logit, -100 to 100; up to 1,024 entries.
        allowed_token_ids: The only ids that may be chosen; at least one. None: all.
        bad_words: Up to 128 strings that must not be generated, at most 256 characters each.
        skip_special_tokens: Leave special tokens out of the text.
        structured: What the text must be: a `StructuredOutput`, or its fields by name. End-of-text and `stop_token_ids` are
            allowed exactly when the text is complete; stop strings and `max_tokens` may cut it short.
        extra: Up to 32 named values for plugins; the engine itself reads none.

    Raises:
        InvalidRequestError: A value is out of its range; the message names the field, the value and the range.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        if isinstance(self.stop, str):
            set_field(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words"):
            if getattr(self, name) is None:
                set_field(self, name, ())
        if self.extra is None:
            set_field(self, "extra", {})
        if isinstance(self.structured, Mapping):
            set_field(self, "structured", _structured_from(self.structured))
        is_structure = self.structured is None or isinstance(self.structured, StructuredOutput)
        _check("structured", self.structured, is_structure, "left out or a StructuredOutput")
        self._check_counts()
        self._check_distribution()
        self._check_lists()
        for name in ("stop", "stop_token_ids", "bad_words"):
            set_field(self, name, tuple(getattr(self, name)))
        if self.allowed_token_ids is not None:
            set_field(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.use_beam_search:
            self._check_beam_search()

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine runs: `best_of`, else `n`."""
        return self.n if self.best_of is None else self.best_of

    @property
    def sequences_field(self) -> str:
        """Which field says how many: "best_of" or "n"."""
        return "n" if self.best_of is None else "best_of"

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most likely one."""
        return self.temperature == 0.0

    def _check_counts(self) -> None:
        _check("n", self.n, _is_int(self.n) and 1 <= self.n <= MAX_N, f"a whole number from 1 to {MAX_N}")
        _check(
            "best_of",
            self.best_of,
            self.best_of is None or (_is_int(self.best_of) and self.n <= self.best_of <= MAX_N),
            f"left out or a whole number from n ({self.n}) to {MAX_N}",
        )
        limit = self.max_tokens
        _check(
            "max_tokens", limit, limit is None or (_is_int(limit) and limit >= 1), "left out or a whole number of at least 1"
        )
        _check(
            "min_tokens",
            self.min_tokens,
            _is_int(self.min_tokens) and 0 <= self.min_tokens <= (self.min_tokens if limit is None else limit),
            f"a whole number from 0 to max_tokens ({limit})",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            valid = value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS)
            _check(name, value, valid, f"left out or a whole number from 0 to {MAX_LOGPROBS}")
        _check(
            "seed",
            self.seed,
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63),
            "left out or 0 to 2**63 - 1",
        )

    def _check_distribution(self) -> None:
        for name, low, high in (
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("temperature", 0, 100),
            ("min_p", 0, 1),
            ("length_penalty", -10, 10),
            ("repetition_penalty", 0.01, 10),  # Smaller ones turn float32 logits into infinities.
        ):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and low <= value <= high, f"a number from {low} to {high}")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, up to 1")
        _check("top_k", self.top_k, _is_int(self.top_k) and -1 <= self.top_k <= 2**31 - 1, "-1, 0 (all) or at least 1")
        _check(
            "early_stopping",
            self.early_stopping,
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            'True, False or "never"',
        )
        for name in ("use_beam_search", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "true or false")

    def _check_lists(self) -> None:
        for name, max_items in (("stop", MAX_STOP_STRINGS), ("bad_words", MAX_BAD_WORDS)):
            value = getattr(self, name)
            valid = _is_sequence(value, max_items) and all(isinstance(s, str) and 1 <= len(s) <= MAX_STOP_LENGTH for s in value)
            _check(name, value, valid, f"at most {max_items} strings of 1 to {MAX_STOP_LENGTH} characters")
        valid = _is_sequence(self.stop_token_ids, MAX_STOP_TOKEN_IDS) and all(
            _is_int(t) and t >= 0 for t in self.stop_token_ids
        )
        _check("stop_token_ids", self.stop_token_ids, valid, f"at most {MAX_STOP_TOKEN_IDS} token ids")
        ids = self.allowed_token_ids
        valid = ids is None or (
            _is_sequence(ids, MAX_ALLOWED_TOKEN_IDS) and bool(ids) and all(_is_int(t) and t >= 0 for t in ids)
        )
        _check("allowed_token_ids", ids, valid, f"left out or 1 to {MAX_ALLOWED_TOKEN_IDS} token ids")
        bias = self.logit_bias
        valid = bias is None or (
            isinstance(bias, Mapping)
            and len(bias) <= MAX_LOGIT_BIAS
            and all(_is_int(k) and k >= 0 and _is_number(v) and -100 <= v <= 100 for k, v in bias.items())
        )
        _check("logit_bias", bias, valid, f"left out or at most {MAX_LOGIT_BIAS} token ids with values from -100 to 100")
        valid = (
            isinstance(self.extra, Mapping)
            and len(self.extra) <= MAX_EXTRA_ENTRIES
            and all(isinstance(k, str) for k in self.extra)
        )
        _check("extra", self.extra, valid, f"a mapping of at most {MAX_EXTRA_ENTRIES} names")

    def _check_beam_search(self) -> None:
        _check("best_of", self.num_sequences, self.num_sequences > 1, "at least 2 with use_beam_search (it is the beam width)")
        _check("temperature", self.temperature, self.temperature == 0, "0 with use_beam_search")
        _check("top_p", self.top_p, self.top_p == 1, "1 with use_beam_search")
        _check("top_k", self.top_k, self.top_k <= 0, "-1 with use_beam_search")
        _check("min_p", self.min_p, self.min_p == 0, "0 with use_beam_search")


def _structured_from(values: Mapping[Any, Any]) -> StructuredOutput:
    names = [f.name for f in fields(StructuredOutput)]
    _check("structured", list(values), all(key in names for key in values), f"made of {', '.join(names)}")
    return StructuredOutput(**values)


SAMPLING_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(SamplingParams))
"""The names of all sampling parameters, for frontends that accept them by name."""


def sampling_texts() -> dict[str, str]:
    """What each sampling parameter is, in the words of the docstring. Under `python -OO`, which drops those, nothing."""
    attributes = (inspect.getdoc(SamplingParams) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    texts = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", attributes, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}


Logprobs = dict[int, float]
"""Token id to raw log probability (nats) at one position: the chosen token first, then the most likely ones, best first."""


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One generated sequence of a request.

    Attributes:
        index: Its rank among the request's outputs, from 0.
        text: The generated text, without the prompt.
        token_ids: The generated token ids, the token that ended it included.
        cumulative_logprob: Sum of the raw log probabilities of `token_ids`, in nats.
        logprobs: One entry per token id, or None when not asked for.
        finish_reason: None while it runs; "stop" (end of text, stop string or stop token), "length", "abort" or "error".
        stop_reason: The stop string, or the id of `stop_token_ids`, that ended it; None for an end-of-text token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request with all that has been generated for it so far.

    Attributes:
        request_id: The id that the request was added under.
        prompt: Its text; None when it was given as token ids.
        prompt_token_ids: The tokens the model saw.
        outputs: The sequences. With beam search or `best_of` above `n` only the end shows which they are, and they come best
            first.
        finished: Whether this is the last output of the request.
        prompt_logprobs: One entry per prompt token, None for the first; None when not asked for.
        num_cached_tokens: Prompt tokens that were found in the prefix cache.
        num_generated_tokens: Tokens of all sequences, those that `best_of` leaves out among them.
        error: Why the request failed, or None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingOutput:
    """A prompt as a vector.

    Attributes:
        request_id: The id that the request was added under.
        prompt: Its text; None when it was given as token ids.
        prompt_token_ids: The tokens the model saw.
        embedding: As many numbers as the model's hidden size.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    embedding: list[float]


@dataclass(frozen=True, kw_only=True)
class ResumedSequence:
    """What a client has received of one sequence from an engine that died.

    Attributes:
        index: The sequence's number within its request.
        token_ids: Its output so far, at least one token.
        cumulative_logprob: Sum of the raw log probabilities of `token_ids`, in nats.
        is_finished: Whether it has ended, or was aborted.
    """

    index: int
    token_ids: list[int]
    cumulative_logprob: float
    is_finished: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What a client hands to the engine: token ids and numbers, no text.

    Attributes:
        request_id: Unique among the client's unfinished requests.
        client_id: Who asks: the `fair` policy shares between clients.
        prompt_token_ids: At least one.
        params: With `seed` set: the client draws one where the user gave none.
        arrival_s: When it arrived, seconds since the epoch; kept when the request is sent again.
        priority: Smaller is sooner, under the `priority` policy.
        cache_salt: Requests share cached blocks only under equal salts.
        resumed: Empty, or one entry for each of the request's sequences: the engine goes on behind their tokens. Everything
            that depends on the output (limits, penalties, random numbers) goes on too. Beam search starts again instead.
        task: "embed" gives one vector for the prompt and no token; most of `params` then means nothing.
        pooling: What "embed" gives: the mean of the model's last hidden states over the prompt, or that of its last token.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    client_id: str = ""
    priority: int = 0
    cache_salt: str = ""
    resumed: list[ResumedSequence] = field(default_factory=list)
    task: Literal["generate", "embed"] = "generate"
    pooling: Literal["mean", "last"] = "mean"


@dataclass(frozen=True, kw_only=True)
class SequenceUpdate:
    """What one step added to one sequence.

    Attributes:
        index: The sequence's number within its request, from 0.
        new_token_ids: The tokens added since the last update.
        new_logprobs: One entry per new token, or None when not asked for.
        cumulative_logprob: Sum of raw log probabilities of all its tokens, in nats.
        finish_reason: None while it runs.
        stop_reason: The id of `stop_token_ids` that ended it, or None.
    """

    index: int
    new_token_ids: list[int]
    cumulative_logprob: float
    new_logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass(kw_only=True)
class RequestUpdate:
    """What one step added to one request. Beam search sends a single one, when it ends: its sequences, best first.

    The scheduler fills it while it applies a step; once handed out it does not change.

    Attributes:
        request_id: The request.
        client_id: Whose it is.
        sequences: Those that changed.
        finished: Whether the request has left the engine.
        new_prompt_logprobs: Entries for the prompt tokens scored in this step (the first token's is None), or None.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        embedding: The last and only update of a request whose task is "embed" has it: the pooled hidden states as they are.
        error: Why it failed, or None.
        is_invalid: The error is the request's own fault (an HTTP frontend answers 400), not the engine's.
        param: The field at fault, or None.
    """

    request_id: str
    sequences: list[SequenceUpdate]
    finished: bool
    new_prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    client_id: str = ""
    embedding: list[float] | None = None
    error: str | None = None
    is_invalid: bool = False
    param: str | None = None

    def exception(self) -> CacheflowError | None:
        """The error that the request's caller gets, if it failed."""
        if self.error is None:
            return None
        return InvalidRequestError(self.error, param=self.param) if self.is_invalid else RequestFailedError(self.error)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A reading of the engine, taken between two steps.

    Attributes:
        num_running: Requests that hold blocks.
        num_waiting: Requests that wait for a first or a further turn.
        num_blocks: KV blocks in all.
        num_free_blocks: Blocks that hold nothing worth keeping.
        num_cached_blocks: Blocks that no request holds, kept for their content.
        num_preemptions: Requests that lost their blocks, since the start.
        num_prompt_tokens: Prompt tokens taken in, since the start.
        num_generated_tokens: Tokens generated, since the start.
        num_cached_tokens: Prompt tokens found in the prefix cache, since the start.
        num_steps: Steps run, since the start.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_steps: int


MAX_VIEWED_REQUESTS = 256
"""Most requests of an `EngineView`."""
BLOCK_FREE, BLOCK_CACHED, BLOCK_SHARED, BLOCK_OWNED = range(4)
"""The kinds of block in an `EngineView`."""


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """What an `EngineView` tells of a request.

    Attributes:
        request_id: The client's name for it.
        client_id: Whose it is.
        is_running: Whether it holds blocks.
        num_prompt_tokens: Tokens of the prompt.
        num_computed_tokens: Tokens of prompt and output that are in the cache, of the sequence with the most.
        num_output_tokens: Generated so far, over all sequences.
        num_sequences: Sequences that run, or will.
        arrival_s: Seconds since the epoch.
    """

    request_id: str
    client_id: str
    is_running: bool
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    num_sequences: int
    arrival_s: float


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """Who holds which block of the engine, taken between two steps.

    Attributes:
        stats: The counts of the same moment.
        requests: At most 256: running ones in their order, then the waiting ones that come up first.
        blocks: One number per KV block: 0 free, 1 cached (no request holds it), 2 shared by several requests or sequences (or
            held by one that `requests` has no place for), 3 + k held by `requests[k]` alone.
    """

    stats: EngineStats
    requests: list[RequestSummary]
    blocks: list[int]


@dataclass(frozen=True, kw_only=True)
class TokenizerData:
    """A tokenizer as data, so that a client needs no model files.

    Attributes:
        tokenizer_json: The `tokenizers` library's serialised form. Its own post-processor is not used: `add_bos` says it all.
        chat_template: Jinja source, or None.
        special_tokens: Names as the chat template uses them ("bos_token", "eos_token", …) to their text.
        bos_token_id: Or None.
        eos_token_ids: Those that end a text, the tokenizer's and the generation configuration's.
        add_bos: Whether the BOS token goes before a text.
    """

    tokenizer_json: str
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    add_bos: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """All that a client needs to know of the served model.

    Attributes:
        model: The name it was asked for under.
        architecture: The model class's name in the `cacheflow.models` group.
        dtype: Of the weights' arithmetic, such as "bfloat16".
        vocab_size: Rows of the logits; a token id is below it.
        max_model_len: Most tokens of prompt and output together.
        max_num_seqs: Most sequences at a time, so the most of one request.
        tokenizer: The tokenizer as data.
        engine_version: Of the engine's distribution.
    """

    model: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    tokenizer: TokenizerData
    engine_version: str
