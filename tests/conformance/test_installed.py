"""Every installed plugin passes its group's suite; a third party's gets this by being installed."""

from __future__ import annotations

import pytest

from cacheflow.conformance import NotApplicable, checks_of
from cacheflow.plugins import GROUPS, find_plugins, load_plugin

CASES = [
    pytest.param(group, name, check, id=f"{group.removeprefix('cacheflow.')}-{name}-{check}")
    for group in GROUPS
    for name in find_plugins(group)
    for check in checks_of(group)
]


@pytest.mark.parametrize(("group", "name", "check"), CASES)
def test_the_plugin_passes(group: str, name: str, check: str) -> None:
    try:
        checks_of(group)[check](load_plugin(group, name), name)
    except NotApplicable as reason:
        pytest.skip(str(reason))
