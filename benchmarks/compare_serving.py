"""W7 for `compare.py`: the servers of several systems under the same Poisson arrivals, each alone on the machine.

All are started first; then rates and seeds are gone through, and for each the servers take turns while the others are held.
The client runs on the same cores for all of them. Prompts are fresh in every run.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.environments import variables
from peers.servers import server
from programs import Program, free_port
from record import Item, shortened, workload
from serving import Server, fresh, run, served_model, summarize

RATES = (1.03, 1.86)
"""Requests/s: what two cores without matrix units bear with some room, and nearly all that they do."""
DEADLINE_S = 400.0
"""Of a start: one that compiles takes 80 to 110 s on two cores that do nothing else."""
GOOD = (1.0, 0.1)
"""Seconds to the first token, and of each further one, within which a request counts as good."""


class Running:
    """A server that is ready and held."""

    def __init__(self, name: str, python: Path, folder: Path) -> None:
        self.name = name
        port = free_port()
        self.program = Program(server(name, python, folder, port), variables(name, python), stdout=sys.stderr)
        try:
            url = f"http://127.0.0.1:{port}"
            self.ready_s = self.program.wait_until_it_answers(f"{url}/v1/models", DEADLINE_S)
            self._server = Server(url, "openai", served_model(url, None), None)
            # Whatever is compiled or laid out at the first batch.
            self._run(fresh(shortened(workload("w1")), None), 50.0, 0)
        except BaseException:
            self.program.end()
            raise
        self.program.hold()

    def measure(self, items: list[Item], rate: float, seed: int) -> dict[str, Any]:
        """All requests at their times, while this server alone runs."""
        self.program.resume()
        try:
            return self._run(fresh(items, None), rate, seed)
        finally:
            self.program.hold()

    def _run(self, items: list[Item], rate: float, seed: int) -> dict[str, Any]:
        traces, elapsed_s = asyncio.run(run(self._server, items, rate, seed))
        summary = summarize(traces, elapsed_s, *GOOD)
        if summary["num_failed"]:
            raise EOFError(f"{summary['num_failed']} requests failed, the first: {next(t.error for t in traces if t.error)}")
        for quantiles in summary.values():
            if isinstance(quantiles, dict):
                quantiles.pop("curve", None)
        return summary


def measurements(
    pythons: dict[str, Path], folder: Path, runs: list[tuple[float, int]], is_short: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each system's name with its figures, for each (rate, seed); a line says why one could not be started."""
    items = shortened(workload("w1")) if is_short else workload("w1")
    servers: list[Running] = []
    try:
        for name, python in pythons.items():
            try:
                servers.append(Running(name, python, folder))
            except (EOFError, OSError) as error:
                print(f"w7 {name}: not measured, {error}", flush=True)
        for number, (rate, seed) in enumerate(runs):
            turn = number % max(1, len(servers))
            for server in servers[turn:] + servers[:turn]:
                figures = server.measure(items, rate, seed)
                yield server.name, {"rate": rate, "seed": seed, "ready_s": round(server.ready_s, 2), **figures}
    finally:
        for server in servers:
            server.program.end()
