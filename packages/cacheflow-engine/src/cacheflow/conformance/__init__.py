"""Conformance: one suite per plugin group, run on an installed plugin.

`cacheflow plugins check NAME` and `tests/conformance` run the same checks, so that a third-party plugin is held to what the
built-in ones are. A suite is a module with `CHECKS`, a tuple of functions `check_<what>(plugin, ...)`; this package knows no
test framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from cacheflow.conformance.verdict import FAILED, NOT_APPLICABLE, PASSED, CheckResult, ConformanceFailure, NotApplicable
from cacheflow.plugins import load_plugin

__all__ = [
    "FAILED",
    "NOT_APPLICABLE",
    "PASSED",
    "CheckResult",
    "ConformanceFailure",
    "NotApplicable",
    "checks_of",
    "run_checks",
]

Check = Callable[[Any, str], None]
"""Takes the loaded plugin and its name; returns, or raises `ConformanceFailure` or `NotApplicable`."""


def checks_of(group: str) -> dict[str, Check]:
    """The checks of a group such as "cacheflow.models", by name, in the order in which they build on each other."""
    suite = import_module(f"cacheflow.conformance.{group.removeprefix('cacheflow.')}")
    return {check.__name__.removeprefix("check_"): check for check in suite.CHECKS}


def run_checks(group: str, name: str) -> Iterator[CheckResult]:
    """Runs a group's suite on one installed plugin, yielding each verdict as it falls.

    An exception that a plugin lets out is a failure of that check; the checks after it still run.

    Raises:
        PluginError: It can't be loaded.
    """
    plugin = load_plugin(group, name)
    for title, check in checks_of(group).items():
        yield CheckResult(title, *_verdict(check, plugin, name))


def _verdict(check: Check, plugin: Any, name: str) -> tuple[str, str]:
    try:
        check(plugin, name)
    except NotApplicable as reason:
        return NOT_APPLICABLE, str(reason)
    except ConformanceFailure as failure:
        return FAILED, str(failure)
    except Exception as error:
        return FAILED, f"raised {type(error).__name__}: {error}"
    return PASSED, ""
