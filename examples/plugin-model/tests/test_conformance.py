"""Holds the plugin to what the engine's own models are held to."""

from __future__ import annotations

from cacheflow.conformance import FAILED, NOT_APPLICABLE, checks_of, run_checks


def test_the_model_passes_every_check_of_its_group() -> None:
    results = {result.check: result for result in run_checks("cacheflow.models", "GPTNeoXForCausalLM")}
    assert results.keys() == checks_of("cacheflow.models").keys()
    for result in results.values():
        assert result.verdict not in (FAILED, NOT_APPLICABLE), f"{result.check}: {result.explanation}"
