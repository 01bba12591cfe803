"""A load that a server must bear: Poisson arrivals at 90 % of its capacity, no error, and an even flow of tokens.

First the capacity is measured: so many clients as `--clients` says send one request after the other, each with its tokens
streamed, for a quarter of the time. Then requests of the same kind come at 0.9 times the rate that was reached. It fails if a
request does, or if the 99th percentile of the time between two events of a stream (ITL) is not under 3 times the median.

    cacheflow serve openai --model demo                                 # the server, in another terminal
    python benchmarks/load.py                                           # two minutes behind the measurement
    python benchmarks/load.py --duration 10 --clients 4 --no-limit      # a short form that looks for errors only
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from record import Item, surroundings, workload, write
from serving import Server, Trace, fresh, measure, quantiles, served_model

SHARE = 0.9
MAX_RATIO = 3.0
"""Of ITL's 99th percentile and its median."""


async def capacity(server: Server, items: list[Item], num_clients: int, seconds: float) -> tuple[float, list[Trace]]:
    """Requests per second with so many clients at work all the time."""
    following = cycle(items)
    end_s = time.perf_counter() + seconds
    traces: list[Trace] = []

    async def client() -> None:
        while time.perf_counter() < end_s:
            traces.append(await measure(server, next(following), time.perf_counter()))

    start_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return len(traces) / (time.perf_counter() - start_s), traces


async def load(server: Server, items: list[Item], rate: float, seconds: float, seed: int) -> list[Trace]:
    """Sends requests at Poisson times for so long; returns when all have ended."""
    draw = random.Random(seed)
    following = cycle(items)
    due_s = time.perf_counter()
    end_s = due_s + seconds
    tasks = []
    while due_s < end_s:
        tasks.append(asyncio.create_task(measure(server, next(following), due_s)))
        due_s += draw.expovariate(rate)
    return list(await asyncio.gather(*tasks))


def summarize(traces: list[Trace]) -> dict[str, Any]:
    """How the requests went."""
    good = [trace for trace in traces if trace.error is None]
    return {
        "num_requests": len(traces),
        "num_failed": len(traces) - len(good),
        "error": next((trace.error for trace in traces if trace.error), None),
        "ttft_s": quantiles([trace.ttft_s for trace in good]),
        "itl_s": quantiles([after - before for t in good for before, after in zip(t.event_s, t.event_s[1:], strict=False)]),
    }


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000", help="of the server, without /v1; http only")
    parser.add_argument("--api-key", help="sent as a Bearer token")
    parser.add_argument("--duration", type=float, default=120.0, help="seconds under load")
    parser.add_argument("--clients", type=int, default=16, help="that the capacity is measured with")
    parser.add_argument("--output-tokens", type=int, default=64, help="of each request")
    parser.add_argument("--workload", default="w1", help="whose prompts are sent")
    parser.add_argument("--vocab-size", type=int, help="of a model with another tokenizer: prompts of random tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--no-limit", action="store_true", help="don't judge ITL")
    parser.add_argument("--output", type=Path, help="a file to append a JSON line to")
    arguments = parser.parse_args()
    url = arguments.url.rstrip("/")
    server = Server(url, "openai", served_model(url, arguments.api_key), arguments.api_key)
    items = [Item(item.prompt_token_ids[:256], arguments.output_tokens) for item in workload(arguments.workload)]
    items = fresh(items, arguments.vocab_size)
    reached, first = await capacity(server, items, arguments.clients, arguments.duration / 4)
    traces = await load(server, items, SHARE * reached, arguments.duration, arguments.seed)
    summary = summarize(first + traces) | {name: summarize(traces)[name] for name in ("ttft_s", "itl_s")}
    itl = summary["itl_s"]
    ratio = itl["p99"] / itl["p50"] if itl else float("inf")
    summary |= {"benchmark": "load", "duration_s": arguments.duration, "num_clients": arguments.clients, "ratio": ratio}
    summary |= {"capacity_per_s": reached, "rate": SHARE * reached, "output_tokens": arguments.output_tokens}
    print(
        f"Capacity {reached:.2f} requests/s with {arguments.clients} clients; at {SHARE * reached:.2f} for "
        f"{arguments.duration:g} s: {summary['num_failed']} of {summary['num_requests']} failed"
        + (f", ITL p50 {itl['p50'] * 1000:.1f} ms, p99 {itl['p99'] * 1000:.1f} ms, {ratio:.2f} times as long" if itl else "")
    )
    write(arguments.output, summary | surroundings())
    if summary["num_failed"]:
        print(f"The first error: {summary['error']}", file=sys.stderr)
    is_even = arguments.no_limit or ratio < MAX_RATIO
    return 0 if is_even and not summary["num_failed"] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
