"""What tests of kernels share: the implementations of an operation that run here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cacheflow_kernels.cpu import library


def levels() -> list[str]:
    loaded = library.load()
    return [] if loaded is None else list(library.LEVELS[1 : int(loaded.cf_machine_level()) + 1])


@pytest.fixture(params=[*levels(), "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the C++ kernels at each level that the machine has."""
    loaded = library.load()
    if request.param == "reference":
        yield "reference"
        return
    assert loaded is not None
    before = library.level()
    loaded.cf_set_level(library.LEVELS.index(request.param))
    yield "cpu"
    loaded.cf_set_level(library.LEVELS.index(before))
