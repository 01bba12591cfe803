"""Memory that sharing saves, and slots that are allocated and never filled, observed in the real engine.

    python benchmarks/sharing.py            # parallel sampling and beam search with 2, 4 and 6 sequences; waste on W1
    python benchmarks/sharing.py --short    # a few requests

The saving is the PagedAttention paper's (arXiv:2309.06180, figure 15): blocks saved by sharing / blocks without sharing,
averaged over steps. It is read when a step is about to run, from the block tables of all sequences: without sharing each entry
of a table would be a block of its own. Lengths are those of Alpaca (`make_alpaca_like.py`). Prefix caching is off, so that only
the sequences of one request share.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

from record import Item, surroundings, workload, write

from cacheflow import SamplingParams
from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.interfaces import Capacity, Executor, Pending, Step, StepOutput
from cacheflow.kvcache.manager import KVManager
from cacheflow.plugins import select_plugin
from cacheflow.types import EngineRequest

WIDTHS = (2, 4, 6)
PAPER = {("parallel sampling", 2): 6.09, ("parallel sampling", 4): 8.53, ("parallel sampling", 6): 9.79} | {
    ("beam search", 2): 37.56,
    ("beam search", 4): 53.13,
    ("beam search", 6): 55.16,
}
"""Percent saved for OPT-13B on Alpaca, from the paper."""


class Observer:
    """An executor that reads the block tables before each step and leaves the work to another one."""

    CONTRACT_VERSION: ClassVar[int] = 1

    @classmethod
    def supports(cls, config: EngineConfig) -> tuple[str, ...]:
        """Whatever the other one supports."""
        return ()

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.kv: KVManager | None = None
        self.savings: list[float] = []
        self._slots: dict[int, tuple[int, int]] = {}

    def start(self, config: EngineConfig) -> Capacity:
        """Starts the other one."""
        return self._executor.start(config)

    def submit(self, step: Step) -> Pending[StepOutput]:
        """Reads, then passes the step on."""
        assert self.kv is not None
        tables = [table.blocks for table in self.kv.tables.values()]
        num_unshared = sum(map(len, tables))
        self.savings.append(1 - len({block for blocks in tables for block in blocks}) / num_unshared)
        for entry in step.sequences:
            num_filled = entry.num_computed_tokens + len(entry.token_ids)
            self._slots[entry.sequence_id] = (len(entry.block_table) * self.kv.block_size, num_filled)
        return self._executor.submit(step)

    @property
    def waste(self) -> float:
        """Share of allocated slots that their sequence never filled. For requests of one sequence, without prefix caching."""
        num_allocated = sum(allocated for allocated, _ in self._slots.values())
        return 1 - sum(filled for _, filled in self._slots.values()) / num_allocated

    def check(self) -> None:
        """Asks the other one."""
        self._executor.check()

    def close(self) -> None:
        """Closes the other one."""
        self._executor.close()


class Engine:
    """One engine for all measurements: only what it observes starts anew."""

    def __init__(self, model: str) -> None:
        config = EngineConfig(model=model, dtype="bfloat16", enable_prefix_caching=False)
        _, local = select_plugin("cacheflow.executors", "auto", config)
        self._observer = Observer(local())
        self._core = EngineCore(config, executor=self._observer)

    def run(self, items: list[Item], **params: Any) -> Observer:
        """All requests at once, to the end; returns what was observed."""
        observer, core = self._observer, self._core
        observer.kv, observer.savings, observer._slots = core.scheduler.kv, [], {}
        for index, item in enumerate(items):
            sampling = SamplingParams(max_tokens=item.num_output_tokens, ignore_eos=True, seed=index, **params)
            core.add(
                EngineRequest(
                    request_id=str(index),
                    prompt_token_ids=item.prompt_token_ids,
                    params=sampling,
                    arrival_s=time.time(),
                )
            )
        while core.has_unfinished:
            core.step()
        return observer

    def close(self) -> None:
        """Frees the model."""
        self._core.close()


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what to run; the workloads are tokens of SmolLM2 (default: demo)")
    parser.add_argument("--short", action="store_true", help="a few requests only")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    alpaca, w1 = workload("alpaca_like"), workload("w1")
    if arguments.short:
        alpaca, w1 = alpaca[:4], [Item(item.prompt_token_ids, item.num_output_tokens // 4 + 1) for item in w1[:8]]
    facts = surroundings()
    engine = Engine(arguments.model)
    print("| method | sequences | blocks saved | in the paper (OPT-13B, Alpaca) |\n| --- | --- | --- | --- |")
    for method, settings in (("parallel sampling", {}), ("beam search", {"use_beam_search": True, "temperature": 0.0})):
        for width in WIDTHS:
            saving = 100 * statistics.mean(engine.run(alpaca, n=width, **settings).savings)
            print(f"| {method} | {width} | {saving:.2f} % | {PAPER[method, width]} % |", flush=True)
            line = {"benchmark": "sharing", "method": method, "num_sequences": width, "saved_percent": round(saving, 2)}
            write(arguments.output, {**line, "is_short": arguments.short, "model": arguments.model, **facts})
    waste = 100 * engine.run(w1, temperature=0.0).waste
    print(f"\nKV slots allocated and never filled on W1: {waste:.2f} %")
    line = {"benchmark": "waste", "workload": "w1", "never_filled_percent": round(waste, 2)}
    write(arguments.output, {**line, "is_short": arguments.short, "model": arguments.model, **facts})
    engine.close()


if __name__ == "__main__":
    main()
