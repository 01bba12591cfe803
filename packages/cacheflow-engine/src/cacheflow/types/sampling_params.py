"""How the tokens of a request are chosen, and what its text must be. Everything is checked when it is made."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cacheflow.errors import InvalidRequestError, shown

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
