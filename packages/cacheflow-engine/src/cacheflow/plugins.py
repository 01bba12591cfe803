"""Finds and loads plugins: Python entry points, in the groups that `GROUPS` names.

Discovery reads names without importing anything. Loading happens on selection, once per process. An explicit choice that
fails raises with every reason; `auto` takes the first supported one by declared priority and logs one line. Nothing is
swallowed. This module knows no group's interface beyond `CONTRACT_VERSION`, `priority` and `supports`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cacheflow.errors import PluginError
from cacheflow.interfaces import CONTRACT_VERSION

logger = logging.getLogger(__name__)

GROUPS: dict[str, str] = {
    "cacheflow.models": "model architectures",
    "cacheflow.weight_loaders": "checkpoint formats",
    "cacheflow.attention_backends": "paged attention",
    "cacheflow.op_providers": "operations between attention calls",
    "cacheflow.logits_processors": "changes to logits before a token is chosen",
    "cacheflow.schedulers": "scheduling policies",
    "cacheflow.executors": "where steps run",
    "cacheflow.frontends": "HTTP services",
    "cacheflow.commands": "subcommands of `cacheflow`",
}
"""Every group, with what its members are."""

UNVERSIONED_GROUPS = frozenset({"cacheflow.commands"})
"""Groups whose members are click commands: another library's interface, so without a contract version of ours."""


@dataclass(frozen=True)
class Plugin:
    """One entry point, not yet imported.

    Attributes:
        group: Its group, such as "cacheflow.models".
        name: Its name within the group.
        distribution: The distribution that declares it.
        version: Of that distribution.
        entry_point: What `load_plugin` imports.
    """

    group: str
    name: str
    distribution: str
    version: str
    entry_point: EntryPoint


@cache
def find_plugins(group: str) -> dict[str, tuple[Plugin, ...]]:
    """All plugins of a group by name, in alphabetical order. More than one for a name is a conflict.

    Raises:
        PluginError: There is no such group.
    """
    if group not in GROUPS:
        raise PluginError(f"There is no plugin group {group!r}. Groups: {', '.join(GROUPS)}.")
    found: dict[str, dict[tuple[str, str], Plugin]] = {}
    for entry in entry_points(group=group):
        distribution = entry.dist.name if entry.dist else "unknown"
        version = entry.dist.version if entry.dist else "unknown"
        plugin = Plugin(group, entry.name, distribution, version, entry)
        found.setdefault(entry.name, {})[(distribution, entry.value)] = plugin
    return {name: tuple(found[name].values()) for name in sorted(found)}


@cache
def load_plugin(group: str, name: str) -> Any:
    """Imports one plugin and checks its contract version.

    Raises:
        PluginError: It is not installed, claimed by two distributions, fails to import, or is made for another contract.
    """
    plugins = find_plugins(group)
    if name not in plugins:
        raise PluginError(
            f"No plugin {name!r} in the group {group} ({GROUPS[group]}). Installed: {', '.join(plugins) or 'none'}."
        )
    candidates = plugins[name]
    if len(candidates) > 1:
        owners = " and ".join(f"{p.distribution} ({p.entry_point.value})" for p in candidates)
        raise PluginError(f"{group}: the name {name!r} is claimed by {owners}. Uninstall one of them.")
    plugin = candidates[0]
    try:
        value = plugin.entry_point.load()
    except Exception as error:
        raise PluginError(
            f"{group}: {name!r} of {plugin.distribution} {plugin.version} can't be imported: {type(error).__name__}: {error}"
        ) from error
    version = getattr(value, "CONTRACT_VERSION", None)
    if group not in UNVERSIONED_GROUPS and version != CONTRACT_VERSION:
        raise PluginError(
            f"{group}: {name!r} of {plugin.distribution} {plugin.version} is made for contract version {version}, "
            f"this engine has version {CONTRACT_VERSION}. Install a {plugin.distribution} that matches."
        )
    return value


def select_plugin(group: str, requested: str, *arguments: Any) -> tuple[str, Any]:
    """The plugin to use: the requested one, or under "auto" the supported one with the highest priority.

    Args:
        group: Its group; its members have `supports` and, for "auto", may have `priority` (0 without).
        requested: A name, or "auto".
        *arguments: What `supports` is asked about.

    Returns:
        Its name and the loaded plugin.

    Raises:
        PluginError: The requested one is not supported, or none is; with every reason.
    """
    if requested != "auto":
        plugin = load_plugin(group, requested)
        reasons = plugin.supports(*arguments)
        if reasons:
            raise PluginError(f"{group}: {requested!r} can't be used here: {'; '.join(reasons)}.")
        return requested, plugin
    refusals: list[str] = []
    candidates: list[tuple[int, str, Any]] = []
    for name in find_plugins(group):
        try:
            plugin = load_plugin(group, name)
        except PluginError as error:
            refusals.append(str(error))
            continue
        candidates.append((-getattr(plugin, "priority", 0), name, plugin))
    for _, name, plugin in sorted(candidates, key=lambda c: c[:2]):
        reasons = plugin.supports(*arguments)
        if not reasons:
            skipped = f" (skipped {'; '.join(refusals)})" if refusals else ""
            logger.info("%s: using %s%s", group, name, skipped)
            return name, plugin
        refusals.append(f"{name}: {', '.join(reasons)}")
    raise PluginError(f"{group}: nothing installed can be used here: {'; '.join(refusals) or 'the group is empty'}.")
