"""Finds tool calls in the text of an answer, while it grows. It knows text only: no tokens, no HTTP, no tool.

A call is a JSON object `{"name": …, "arguments": {…}}`, or "parameters" as Llama 3.1 says. Models write it in two forms, which
their chat templates tell apart: between `<tool_call>` and `</tool_call>` (Hermes, Qwen, SmolLM2), or as the whole answer (Llama
3.1, Mistral behind its marker). An answer forced by `tool_choice` is of the second form, or just the arguments of one call.

A text in parts gives the same as the text at once: what may become a call is held back until it is certain.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
SEPARATORS = " \t\r\n,;[]"
"""What may stand between calls; lists of calls are taken apart."""
ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True)
class CallDelta:
    """What a call has gained.

    Attributes:
        index: Its number within the answer.
        arguments: More of its JSON.
        id: On the first delta of the call.
        name: On the first delta of the call.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class Parsed:
    """What a part of the text has brought: content, and calls behind it."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolCallParser:
    """Takes an answer apart into content and calls.

    Args:
        is_marked: Calls stand between markers; otherwise an answer that begins with "{" or "[" is made of them.
        max_calls: Further ones are dropped.
    """

    def __init__(self, is_marked: bool, max_calls: int) -> None:
        self._is_marked = is_marked
        self._max_calls = max_calls
        self._num_calls = 0
        self._is_behind_call = False  # Where whitespace is no content.
        self._looks_for_calls = True
        self._is_in_calls = False
        self._held = ""  # Outside of calls: what may belong to a call's beginning.
        self._block = ""  # Inside: all that was read since the last call that was recognised.
        self._has_call = False  # Inside: whether there was one, so that what follows it are separators.
        self._tail = ""  # Inside: how much of the end marker was read.
        self._reader: _CallReader | None = None

    def feed(self, text: str) -> Parsed:
        """Takes the next part."""
        parsed = Parsed()
        while text:
            text = self._read_calls(text, parsed) if self._is_in_calls else self._read_content(text, parsed)
        return parsed

    def finish(self) -> Parsed:
        """What is left when no more will come."""
        parsed = Parsed()
        self._give_up(parsed, self._held)
        return parsed

    def _read_content(self, text: str, parsed: Parsed) -> str:
        """Returns what is left to read."""
        text, self._held = self._held + text, ""
        if not self._looks_for_calls:
            self._add_content(text, parsed)
            return ""
        if not self._is_marked:
            start = len(text) - len(text.lstrip())
            if start == len(text):
                self._held = text
                return ""
            if text[start] in "{[":
                self._enter(text[:start])
                return text[start:]
            self._looks_for_calls = False
            return text
        start = text.find(BEGIN)
        if start >= 0:
            content = text[:start].rstrip()
            self._add_content(content, parsed)
            self._enter(text[len(content) : start + len(BEGIN)])
            return text[start + len(BEGIN) :]
        certain = len(text) - _num_begun(text)
        content = text[:certain].rstrip()
        self._add_content(content, parsed)
        self._held = text[len(content) :]
        return ""

    def _enter(self, block: str) -> None:
        self._is_in_calls, self._block, self._has_call = True, block, False

    def _add_content(self, text: str, parsed: Parsed) -> None:
        if self._is_behind_call:
            text = text.lstrip()
            self._is_behind_call = not text
        parsed.content += text

    def _read_calls(self, text: str, parsed: Parsed) -> str:
        if self._reader is None:
            text = self._skip(text, parsed)
            if not text or not self._is_in_calls:
                return text
            self._reader = _CallReader()
        num_read = self._reader.feed(text)
        self._block += text[:num_read]
        self._tell(self._reader, parsed)
        if self._reader.is_closed:
            if self._reader.name is None:
                self._give_up(parsed, "")
            else:
                self._num_calls += self._num_calls < self._max_calls
                self._block, self._has_call, self._is_behind_call = "", True, True
            self._reader = None
        return text[num_read:]

    def _skip(self, text: str, parsed: Parsed) -> str:
        """Passes over what stands between calls."""
        for position, char in enumerate(text):
            if char == "{":
                self._tail = ""
                return text[position:]
            tail = self._tail + char
            if self._is_marked and END.startswith(tail):
                self._tail = "" if tail == END else tail
                self._block += char
                if tail == END:
                    self._is_in_calls, self._block = False, ""
                    return text[position + 1 :]
            elif char in SEPARATORS and not self._tail:
                self._block += char
            else:
                self._tail = ""
                self._give_up(parsed, "")
                return text[position:]
        return ""

    def _tell(self, reader: _CallReader, parsed: Parsed) -> None:
        if self._num_calls >= self._max_calls or reader.name is None:
            return
        is_first = not reader.is_told
        arguments = reader.take_arguments()
        if is_first:
            parsed.calls.append(CallDelta(self._num_calls, arguments, new_call_id(), reader.name))
        elif arguments:
            parsed.calls.append(CallDelta(self._num_calls, arguments))

    def _give_up(self, parsed: Parsed, held: str) -> None:
        """What was read as a call is none: it belongs to the content. A call that was already told stays as it is."""
        reader = self._reader
        is_dropped = self._has_call if reader is None else reader.is_told or self._num_calls >= self._max_calls
        self._add_content(held if is_dropped else self._block + held, parsed)
        self._is_in_calls, self._has_call, self._block, self._held, self._reader = False, False, "", "", None
        self._looks_for_calls = self._is_marked


def new_call_id() -> str:
    """An id that a tool's result refers to."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _num_begun(text: str) -> int:
    """How many of the last characters may be the beginning of the marker."""
    return next(n for n in range(min(len(BEGIN) - 1, len(text)), -1, -1) if text.endswith(BEGIN[:n]))


class _CallReader:
    """Reads one JSON object character by character, and knows where its arguments stand."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_closed = False
        self.is_told = False
        self._text = ""
        self._depth = 0
        self._string_start: int | None = None
        self._is_escaped = False
        self._key: str | None = None
        self._value_start: int | None = None
        self._arguments: tuple[int, int | None] | None = None  # Where they begin and end.
        self._num_given = 0

    def feed(self, text: str) -> int:
        """Reads up to the end of the object at most; returns how many characters that were."""
        for position, char in enumerate(text):
            here = len(self._text) + position
            if self._string_start is not None:
                self._read_in_string(char, here, text)
            elif self._read(char, here, text):
                self._text += text[: position + 1]
                self.is_closed = True
                return position + 1
        self._text += text
        return len(text)

    def take_arguments(self) -> str:
        """The JSON of the arguments as far as it is known and was not taken before; the call is told from now on."""
        self.is_told = True
        if self._arguments is None:
            return "{}" if self.is_closed else ""
        start, end = self._arguments
        known = self._text[start : len(self._text) if end is None else end]
        if not known.startswith("{"):
            # Some models write the arguments as a string that holds JSON, which is clear only when it ends.
            if end is None or self._num_given:
                return ""
            value = _load(known)
            known = value if isinstance(value, str) else known
        new, self._num_given = known[self._num_given :], len(known)
        return new

    def _read_in_string(self, char: str, here: int, text: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            start, self._string_start = self._string_start, None
            if self._depth == 1 and self._key is None and start is not None:
                key = _load(self._slice(start, here + 1, text))
                self._key = key if isinstance(key, str) else ""

    def _read(self, char: str, here: int, text: str) -> bool:
        """Whether the object is closed."""
        if self._depth == 1 and self._key is not None and self._value_start is None and char not in " \t\r\n:,}":
            self._value_start = here
            if self._key in ARGUMENT_KEYS:
                self._arguments = (here, None)
        if char == '"':
            self._string_start = here
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            if self._depth == 1:
                self._end_value(here, text)
            self._depth -= 1
            if self._depth == 1 and self._arguments is not None and self._arguments[1] is None:
                self._arguments = (self._arguments[0], here + 1)
            return self._depth == 0
        elif char == "," and self._depth == 1:
            self._end_value(here, text)
        return False

    def _end_value(self, here: int, text: str) -> None:
        if self._value_start is not None:
            raw = self._slice(self._value_start, here, text).rstrip()
            if self._key == "name" and isinstance(value := _load(raw), str) and value:
                self.name = value
            elif self._key in ARGUMENT_KEYS:
                self._arguments = (self._value_start, self._value_start + len(raw))
        self._key = self._value_start = None

    def _slice(self, start: int, end: int, text: str) -> str:
        num_before = len(self._text)
        return self._text[start:end] + text[max(0, start - num_before) : max(0, end - num_before)]


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
