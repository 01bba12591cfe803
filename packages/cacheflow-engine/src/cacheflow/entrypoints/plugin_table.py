"""`cacheflow plugins`: what is installed in every group, what of it can be used on this machine, and why the rest can't.

A status is found by doing: the plugin is loaded, and asked about an ordinary model on this machine where its group has such a
question. This module knows no plugin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import click

from cacheflow.conformance import FAILED, run_checks
from cacheflow.conformance.questions import QUESTIONS
from cacheflow.errors import PluginError
from cacheflow.plugins import GROUPS, find_plugins, load_plugin

USABLE = "usable"
UNAVAILABLE = "unavailable"
BROKEN = "broken"
CONFLICT = "conflict"


@dataclass(frozen=True)
class PluginStatus:
    """One row of the table.

    Attributes:
        group: Such as "cacheflow.models".
        name: Its name within the group.
        distribution: That declares it.
        version: Of the distribution.
        status: `USABLE`; `UNAVAILABLE`: it says that it can't serve here; `BROKEN`: it can't be loaded; `CONFLICT`: two
            distributions claim the name.
        reason: Why it is not usable; empty if it is.
    """

    group: str
    name: str
    distribution: str
    version: str
    status: str
    reason: str = ""


def plugin_statuses() -> Iterator[PluginStatus]:
    """All installed plugins, group by group; two distributions that claim one name are two rows."""
    for group in GROUPS:
        for name, claims in find_plugins(group).items():
            status, reason = _status(group, name, len(claims))
            for plugin in claims:
                yield PluginStatus(group, name, plugin.distribution, plugin.version, status, reason)


def _status(group: str, name: str, num_claims: int) -> tuple[str, str]:
    try:
        plugin = load_plugin(group, name)
    except PluginError as error:
        return (CONFLICT if num_claims > 1 else BROKEN), str(error)
    question = QUESTIONS.get(group)
    if question is None or not hasattr(plugin, "supports"):  # A logits processor need not have it.
        return USABLE, ""
    try:
        reasons = plugin.supports(question())
    except Exception as error:
        return BROKEN, f"supports raised {type(error).__name__}: {error}"
    return (UNAVAILABLE, "; ".join(reasons)) if reasons else (USABLE, "")


def print_table(rows: list[PluginStatus]) -> None:
    """Prints the rows for people, a heading per group, reasons below what they explain."""
    widths = [
        max([len(getattr(row, column)) for row in rows] or [0]) for column in ("name", "distribution", "version", "status")
    ]
    for group, purpose in GROUPS.items():
        click.echo(f"{group}: {purpose}")
        members = [row for row in rows if row.group == group]
        for row in members:
            cells = (row.name, row.distribution, row.version, row.status)
            click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
            if row.reason:
                click.echo(f"      {row.reason}")
        if not members:
            click.echo("  none installed")


def print_json(rows: list[PluginStatus]) -> None:
    """Prints the rows as a JSON array of objects."""
    click.echo(json.dumps([asdict(row) for row in rows], indent=2))


def check_plugin(name: str, group: str | None) -> bool:
    """Runs the conformance suite of every group that has a plugin of this name, printing each check.

    Args:
        name: The plugin's name.
        group: Only this group, with or without the leading "cacheflow."; None: all.

    Returns:
        Whether no check failed.

    Raises:
        PluginError: There is no such plugin, or it can't be loaded.
    """
    chosen = [group if "." in group else f"cacheflow.{group}"] if group else list(GROUPS)
    holders = [g for g in chosen if name in find_plugins(g)]
    if not holders:
        installed = sorted({known for g in chosen for known in find_plugins(g)})
        where = f"in the group {chosen[0]}" if group else "in any group"
        raise PluginError(f"No plugin {name!r} {where}. Installed: {', '.join(installed) or 'none'}.")
    is_conformant = True
    for holder in holders:
        click.echo(f"{holder}: {name}")
        for result in run_checks(holder, name):
            is_conformant = is_conformant and result.verdict != FAILED
            explanation = f": {result.explanation}" if result.explanation else ""
            click.echo(f"  {result.verdict:<14}  {result.check}{explanation}")
    return is_conformant
