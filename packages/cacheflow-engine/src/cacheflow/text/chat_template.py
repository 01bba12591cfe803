"""A model's chat template: messages and tools in, the prompt's text out.

Templates are Jinja programs that come with a model, and run on what clients send. They run in a sandbox that can change
nothing, with limits on time and size (CVE-2025-62426 is about one that had none). Rendering takes as long as the messages
are long: an event loop calls it in a thread. This module knows neither token ids nor HTTP.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cacheflow.errors import CheckpointError, InvalidRequestError
from cacheflow.types import TokenizerData

RENDER_TIMEOUT_S = 2.0
"""How long one rendering may take. A conversation of 100,000 words takes some milliseconds."""
MAX_RENDERED_CHARS = 2**24
"""Longest text that a template may make; no model's context holds more."""
MAX_POWER = 1000
_deadline_s: ContextVar[float] = ContextVar("deadline_s")


class ChatTemplate:
    """The template of one model.

    Args:
        data: The model's tokenizer, which brings template and special tokens.
        timeout_s: How long one rendering may compute; time in which other work has the processor does not count.
        max_chars: How long the text may become.
    """

    def __init__(self, data: TokenizerData, timeout_s: float = RENDER_TIMEOUT_S, max_chars: int = MAX_RENDERED_CHARS) -> None:
        self._special_tokens = data.special_tokens
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._environment = _Environment(max_chars)
        self.source = data.chat_template
        """The Jinja source, or None."""

    @cached_property
    def has_tools(self) -> bool:
        """Whether the template reads the list of tools, so that the model learns of them."""
        if self.source is None:
            return False
        try:
            return "tools" in jinja2.meta.find_undeclared_variables(self._environment.parse(self.source))
        except jinja2.TemplateSyntaxError:
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the model is to go on from, which ends where the assistant's answer begins.

        Args:
            messages: Each with "role" and "content", and what else the template knows.
            tools: In OpenAI's form; the template sees none if this is empty.
            variables: More of what the template reads, such as "enable_thinking".

        Raises:
            InvalidRequestError: The model has no template, the template doesn't take these messages, or the limits are met.
            CheckpointError: The template is no Jinja.
        """
        template = self._template
        values = {
            **(variables or {}),
            **self._special_tokens,
            "messages": list(messages),
            "tools": list(tools) or None,
            "add_generation_prompt": True,
        }
        token = _deadline_s.set(time.thread_time() + self._timeout_s)
        try:
            return self._generate(template, values)
        except (InvalidRequestError, MemoryError):
            raise
        except Exception as error:  # Whatever a template's code does on messages that it was not written for.
            reason = str(error)[:500] or type(error).__name__
            raise InvalidRequestError(f"The model's chat template refuses these messages: {reason}", "messages") from error
        finally:
            _deadline_s.reset(token)

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.source is None:
            raise InvalidRequestError(
                "The model has no chat template, so it takes no messages. Complete a text instead, with /v1/completions.",
                param="messages",
            )
        try:
            return self._environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"The model's chat template can't be read ({error}). Fetch the model's files again."
            ) from error

    def _generate(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        parts, num_chars = [], 0
        for part in template.generate(values):
            _check_clock()
            num_chars += len(part)
            if num_chars > self._max_chars:
                raise _limit(f"more than {self._max_chars} characters")
            parts.append(part)
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with what templates on the hub expect, and a look at the clock wherever a program may take its time."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, max_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self._max_chars = max_chars
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _now

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_clock()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_clock()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_clock()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_clock()
        if operator == "**" and not (abs(left) <= MAX_POWER and abs(right) <= MAX_POWER):
            raise _limit(f"a power above {MAX_POWER}")
        for sized, times in ((left, right), (right, left)):
            if hasattr(sized, "__len__") and isinstance(times, int) and len(sized) * times > self._max_chars:
                raise _limit(f"more than {self._max_chars} characters")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as the library declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_clock() -> None:
    if time.thread_time() > _deadline_s.get(float("inf")):
        raise _limit("too long")


def _limit(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"The model's chat template would take {what} on these messages. Send fewer.", "messages")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
