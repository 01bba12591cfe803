"""Latencies of a running server under Poisson arrivals: TTFT, ITL, TPOT and E2E percentiles, throughput and goodput.

Works against any server by its URL: those with OpenAI's streaming `/v1/completions` and prompts as token ids (cacheflow,
vLLM, llama.cpp's server), and `/generate` of the simple frontend. It is an open loop: requests are sent when they are due,
whatever became of the earlier ones. The first token of each prompt is drawn anew for each run, so that no run finds the
prefixes of an earlier one in a cache. ITL is the time between two events of a stream: servers put more than one token into
an event at times, so TPOT (from the first to the last event, by the tokens after the first) stands beside it.

    cacheflow serve openai --model demo                                                    # the server, in another terminal
    python benchmarks/serving.py --url http://localhost:8000 --rate 1.03 --rate 1.86 --seed 0 --seed 1 --seed 2
    python benchmarks/serving.py --url http://localhost:8001 --api generate --short        # eight requests of 8 tokens
    python benchmarks/serving.py --draw benchmarks/results/serving.jsonl                   # a PNG beside the lines

The client needs only the standard library; it takes part of the same cores if it runs beside the server, so compare only
figures that were taken in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from record import Item, surroundings, workload, write

QUANTITIES = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
NUM_QUANTILES = 101
FIRST_TOKENS = range(1000, 40_000)
"""Plain words in the vocabulary of the workloads' tokenizer."""
SHORT = (8, 8)
"""Requests, and output tokens of each, of the short form."""


@dataclass
class Trace:
    """What was seen of one request: when it was due, when its events came, and its end."""

    due_s: float
    event_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From when it was due to the first event."""
        return self.event_s[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.event_s[-1] - self.event_s[0]) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True)
class Server:
    """Where the requests go, and in whose words."""

    url: str
    api: str
    model: str
    api_key: str | None

    def request(self, item: Item) -> bytes:
        """The bytes of one HTTP request."""
        fields: dict[str, Any] = {
            "prompt": item.prompt_token_ids, "max_tokens": item.num_output_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        if self.api == "openai":
            fields |= {"model": self.model, "stream_options": {"include_usage": True}}
        body = json.dumps(fields).encode()
        where = urlsplit(self.url)
        path = where.path.rstrip("/") + ("/v1/completions" if self.api == "openai" else "/generate")
        lines = [
            f"POST {path} HTTP/1.1", f"Host: {where.netloc}", "Content-Type: application/json", "Accept: text/event-stream",
            f"Content-Length: {len(body)}", "Connection: close",
        ]  # fmt: skip
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


async def measure(server: Server, item: Item, due_s: float) -> Trace:
    """Sends one request when it is due and follows its stream."""
    trace = Trace(due_s)
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    where = urlsplit(server.url)
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port or 80)
        try:
            writer.write(server.request(item))
            async for event in events(reader):
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                if event.get("usage"):
                    trace.num_tokens = event["usage"]["completion_tokens"]
                if server.api == "generate" or event["choices"]:
                    trace.event_s.append(time.perf_counter())
        finally:
            writer.close()
        if not trace.event_s:
            raise ValueError("the stream ended without a token")
    except (OSError, ValueError, EOFError) as error:
        trace.error = f"{type(error).__name__}: {error}"
    trace.end_s = time.perf_counter()
    # A server that gives no counts has generated what was asked for, as it was told to go on past the end of text.
    trace.num_tokens = trace.num_tokens or item.num_output_tokens
    return trace


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of an HTTP answer, up to "[DONE]".

    Raises:
        ValueError: The answer is no stream of events, but an error.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = int(head.split()[1])
    is_chunked = "transfer-encoding: chunked" in head.lower()
    if status != 200:
        raise ValueError(f"status {status}: {(await reader.read(2000)).decode(errors='replace')}")
    received = b""
    while True:
        if is_chunked:
            size = int(await reader.readuntil(b"\r\n"), 16)
            part = (await reader.readexactly(size + 2))[:size]
        else:
            part = await reader.read(65536)
        if not part:
            return
        *whole, received = (received + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            data = event.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if event.startswith(b"data:"):
                yield json.loads(data)


async def run(server: Server, items: list[Item], rate: float, seed: int) -> tuple[list[Trace], float]:
    """Sends all requests at Poisson times of the rate; returns their traces and the seconds from the first to the last end."""
    draw = random.Random(seed)
    warm_up = Item([draw.choice(items[0].prompt_token_ids) for _ in range(16)], 4)
    trace = await measure(server, warm_up, time.perf_counter())
    if trace.error:
        raise SystemExit(f"The server does not answer as it should: {trace.error}")
    start_s = due_s = time.perf_counter()
    tasks = []
    for item in items:
        tasks.append(asyncio.create_task(measure(server, item, due_s)))
        due_s += draw.expovariate(rate)
    traces = await asyncio.gather(*tasks)
    return traces, max(trace.end_s for trace in traces) - start_s


def fresh(items: list[Item], vocab_size: int | None) -> list[Item]:
    """The items with a first token that was drawn anew; with a vocabulary of another size all tokens are."""
    draw = random.SystemRandom()
    made = []
    for item in items:
        ids = [draw.choice(FIRST_TOKENS), *item.prompt_token_ids[1:]]
        if vocab_size is not None:
            ids = [draw.randrange(vocab_size // 2, vocab_size) for _ in ids]
        made.append(Item(ids, item.num_output_tokens))
    return made


def summarize(traces: list[Trace], elapsed_s: float, max_ttft_s: float, max_tpot_s: float) -> dict[str, Any]:
    """Percentiles and rates of one run; requests that failed count as such and for nothing else."""
    good = [trace for trace in traces if trace.error is None]
    samples: dict[str, list[float]] = {
        "ttft_s": [trace.ttft_s for trace in good],
        "itl_s": [after - before for t in good for before, after in zip(t.event_s, t.event_s[1:], strict=False)],
        "tpot_s": [trace.tpot_s for trace in good if trace.num_tokens > 1],
        "e2e_s": [trace.end_s - trace.due_s for trace in good],
    }
    in_time = sum(trace.ttft_s <= max_ttft_s and trace.tpot_s <= max_tpot_s for trace in good)
    return {
        "num_requests": len(traces),
        "num_failed": len(traces) - len(good),
        "elapsed_s": elapsed_s,
        "output_tokens_per_s": sum(trace.num_tokens for trace in good) / elapsed_s,
        "goodput": {"max_ttft_s": max_ttft_s, "max_tpot_s": max_tpot_s, "requests_per_s": in_time / elapsed_s},
        **{name: quantiles(values) for name, values in samples.items()},
    }


def quantiles(values: list[float]) -> dict[str, Any] | None:
    """Mean, percentiles, and the whole curve in `NUM_QUANTILES` points; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    curve = [ordered[round((len(ordered) - 1) * i / (NUM_QUANTILES - 1))] for i in range(NUM_QUANTILES)]
    named = {f"p{percent}": curve[percent] for percent in (50, 90, 99)}
    return {"mean": statistics.fmean(ordered), **named, "num_samples": len(ordered), "curve": curve}


def draw(lines: Path) -> Path:
    """Draws the distributions of all runs of a file, beside it.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("Drawing needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [run for run in map(json.loads, lines.read_text(encoding="utf-8").splitlines()) if run["benchmark"] == "serving"]
    labels = list(dict.fromkeys(f"{run['name']}, {run['rate']:g} requests/s" for run in runs))
    figure, places = pyplot.subplots(1, len(QUANTITIES), figsize=(16, 4), sharey=True, layout="constrained")
    for quantity, place in zip(QUANTITIES, places, strict=True):
        for run in filter(lambda run: run[quantity], runs):
            label = f"{run['name']}, {run['rate']:g} requests/s"
            milliseconds = [1000 * value for value in run[quantity]["curve"]]
            # One colour for the seeds of one system at one rate; the first of them names it.
            place.plot(milliseconds, range(NUM_QUANTILES), color=f"C{labels.index(label) % 10}", linewidth=1, label=label)
        place.set(title=quantity.removesuffix("_s").upper(), xlabel="ms", xscale="log")
        place.grid(alpha=0.3)
    places[0].set_ylabel("% of samples at most this")
    named = dict(zip(*reversed(places[0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)
    image = lines.with_suffix(".png")
    figure.savefig(image, dpi=120)
    return image


def served_model(url: str, api_key: str | None) -> str:
    """The name of the only model that an OpenAI-compatible server has."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with urlopen(Request(f"{url}/v1/models", headers=headers), timeout=60) as answer:
        name: str = json.load(answer)["data"][0]["id"]
        return name


def show(summary: dict[str, Any]) -> None:
    """One run for people."""
    parts = [f"{summary['output_tokens_per_s']:.1f} tokens/s", f"{summary['goodput']['requests_per_s']:.2f} good requests/s"]
    parts += [
        f"{name[:-2].upper()} p50 {summary[name]['p50'] * 1000:.1f} p99 {summary[name]['p99'] * 1000:.1f} ms"
        for name in QUANTITIES
        if summary[name]
    ]
    print(f"{summary['name']} at {summary['rate']:g}/s, seed {summary['seed']}: " + ", ".join(parts), flush=True)
    if summary["num_failed"]:
        print(f"  {summary['num_failed']} of {summary['num_requests']} failed, the first: {summary['error']}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000", help="of the server, without /v1; http only")
    parser.add_argument("--api", choices=("openai", "generate"), default="openai")
    parser.add_argument("--name", default="cacheflow", help="of the system, for the lines and the plot")
    parser.add_argument("--model", help="as the server calls it; default: the first that it lists")
    parser.add_argument("--api-key", help="sent as a Bearer token")
    parser.add_argument("--workload", default="w1")
    parser.add_argument("--vocab-size", type=int, help="of a model with another tokenizer: prompts of random tokens")
    parser.add_argument(
        "--rate", type=float, action="append", help="requests/s; may be given several times; default: 1.03 and 1.86"
    )
    parser.add_argument(
        "--seed", type=int, action="append", help="of the arrivals; may be given several times; default: 0, 1, 2"
    )
    parser.add_argument("--max-ttft-s", type=float, default=1.0, help="a request is good if it is not slower than this …")
    parser.add_argument("--max-tpot-s", type=float, default=0.1, help="… and not slower than this per token")
    parser.add_argument(
        "--short", action="store_true", help=f"{SHORT[0]} requests of {SHORT[1]} output tokens, one rate, one seed"
    )
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to; a PNG of all its runs is drawn beside it")
    parser.add_argument("--draw", type=Path, metavar="LINES", help="only draw the runs of such a file")
    arguments = parser.parse_args()
    if arguments.draw:
        print(draw(arguments.draw))
        return
    items = workload(arguments.workload)
    rates, seeds = arguments.rate or [1.03, 1.86], arguments.seed or [0, 1, 2]
    if arguments.short:
        items = [Item(item.prompt_token_ids[:64], SHORT[1]) for item in items[: SHORT[0]]]
        rates, seeds = arguments.rate or [50.0], arguments.seed or [0]
    url = arguments.url.rstrip("/")
    model = arguments.model or (served_model(url, arguments.api_key) if arguments.api == "openai" else "")
    server = Server(url, arguments.api, model, arguments.api_key)
    about = {"benchmark": "serving", "name": arguments.name, "workload": arguments.workload, "api": arguments.api}
    num_failed = 0
    for rate in rates:
        for seed in seeds:
            traces, elapsed_s = asyncio.run(run(server, fresh(items, arguments.vocab_size), rate, seed))
            summary = {**about, "model": model, "rate": rate, "seed": seed, "is_short": arguments.short}
            summary |= summarize(traces, elapsed_s, arguments.max_ttft_s, arguments.max_tpot_s)
            summary["error"] = next((trace.error for trace in traces if trace.error), None)
            num_failed += summary["num_failed"]
            show(summary)
            write(arguments.output, summary | surroundings())
    if arguments.output:
        print(draw(arguments.output))
    if num_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
