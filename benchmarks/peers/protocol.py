"""How `compare.py` talks to a system: one JSON line in, one out, over the pipes of its process.

In: `{"workload": "w1", "is_short": false, "num_requests": null}`; a number asks for the first so many of its requests. Out:
first `{"system", "versions", "load_s"}`, then for each line `{"elapsed_s", "num_prompt_tokens", "num_output_tokens"}`. It
imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

from record import Item, shortened, workload

Run = Callable[[list[Item], int], tuple[float, list[int]]]
"""Takes requests and n, all with fresh caches; returns the seconds, and the tokens generated per request (over its n)."""


def serve(system: str, packages: tuple[str, ...], load: Callable[[], Run]) -> None:
    """Loads, then answers until the pipe is closed. What the engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started_s = time.perf_counter()
    run = load()
    load_s = round(time.perf_counter() - started_s, 2)
    print(
        json.dumps({"system": system, "versions": {name: version(name) for name in packages}, "load_s": load_s}), file=answers
    )
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        items = workload(asked["workload"])
        if asked["is_short"]:
            items = shortened(items)
        items = items[: asked["num_requests"]]
        elapsed_s, counts = run(items, 4 if asked["workload"] == "w5" else 1)
        answer = {
            "elapsed_s": round(elapsed_s, 4),
            "num_prompt_tokens": sum(len(item.prompt_token_ids) for item in items),
            "num_output_tokens": sum(counts),
        }
        print(json.dumps(answer), file=answers, flush=True)
