"""Our own offline throughput on the workloads W1 to W6, beside the machine's roofline. `compare.py` runs the peers too.

Every run has a fresh engine, so that no run finds the prefixes of an earlier one; loading and a warm-up on other tokens are
not timed. Runs are interleaved. Figures are only comparable within one invocation: run it alone on the machine. W6 is the
shape of Llama-3.2-1B with random weights, which takes 5 GB; W7, requests over HTTP as they arrive, is `serving.py`.

    python benchmarks/offline.py                        # everything, three rounds
    python benchmarks/offline.py --short                # seconds: eight requests of W1, short outputs, one round
    python benchmarks/offline.py --workload w1 --rounds 5 --quantization none int8 --output benchmarks/results/offline.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from model_files import LLAMA_1B_CONFIG
from record import Item, shortened, surroundings, workload, write
from roofline import LLAMA_1B, SMOLLM2_135M, bound_s, measure_limits

from cacheflow import LLM, SamplingParams
from cacheflow.layers.quantization import FORMS

PURPOSE = {
    "w1": "batched throughput",
    "w2": "one stream",
    "w3": "prefill",
    "w4": "shared prefix",
    "w5": "parallel sampling, n = 4",
    "w6": "a 1B shape",
}
COUNTS = {"w3": "prompt"}
"""Which tokens a workload's rate counts, where that is not output."""
WARM_UP = Item(list(range(1000, 1064)), 8)


def run_cacheflow(model: str, items: list[Item], n: int, **options: Any) -> tuple[float, list[int]]:
    """All requests at once through `LLM.generate`; returns the seconds, and the tokens generated for each."""
    with_n: dict[str, Any] = {"n": n, "temperature": 0.8} if n > 1 else {"temperature": 0.0}
    # Contexts as long as the workloads need, as for the peers: W6's own would want 4 GiB for one sequence.
    llm = LLM(model=model, dtype="bfloat16", max_model_len=2048, **options)
    try:
        elapsed_s = 0.0
        for batch in ([WARM_UP], items):
            params = [SamplingParams(max_tokens=item.num_output_tokens, ignore_eos=True, **with_n) for item in batch]
            start = time.perf_counter()
            outputs = llm.generate(
                prompt_token_ids=[item.prompt_token_ids for item in batch], sampling_params=params, use_tqdm=False
            )
            elapsed_s = time.perf_counter() - start
    finally:
        llm.close()
    failed = [output.error for output in outputs if output.error]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return elapsed_s, [sum(len(sequence.token_ids) for sequence in output.outputs) for output in outputs]


def main() -> None:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what to run; the workloads are tokens of SmolLM2 (default: demo)")
    parser.add_argument("--workload", action="append", choices=list(PURPOSE), help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system on each workload (default: 3)")
    parser.add_argument("--short", action="store_true", help="eight requests of W1, short outputs, one round")
    parser.add_argument("--quantization", nargs="+", choices=list(FORMS), default=["none"], help="ours in each (default: none)")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    names = ["w1"] if arguments.short else arguments.workload or list(PURPOSE)

    limits, facts = measure_limits(), surroundings()
    rates: dict[tuple[str, str], list[float]] = {}
    bounds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_1B_CONFIG))
        for round_number in range(1 if arguments.short else arguments.rounds):
            for name in names:
                items = shortened(workload(name)) if arguments.short else workload(name)
                n = 4 if name == "w5" else 1
                model, shape = (folder, LLAMA_1B) if name == "w6" else (arguments.model, SMOLLM2_135M)
                is_random = {"load_format": "dummy", "tokenizer": "demo"} if name == "w6" else {}
                num_prompt_tokens = sum(len(item.prompt_token_ids) for item in items)
                least_s = bound_s(items, n, shape, limits)
                for form in arguments.quantization:
                    elapsed_s, counts = run_cacheflow(model, items, n, quantization=form, **is_random)
                    num_counted = num_prompt_tokens if name in COUNTS else sum(counts)
                    rates.setdefault((name, form), []).append(num_counted / elapsed_s)
                    bounds[name] = num_counted / least_s
                    print(f"{name} {form}: {num_prompt_tokens} + {sum(counts)} tokens in {elapsed_s:.2f} s", flush=True)
                    write(
                        arguments.output,
                        {
                            "benchmark": "offline",
                            "workload": name,
                            "is_short": arguments.short,
                            "system": "cacheflow",
                            "quantization": form,
                            "model": "the shape of Llama-3.2-1B, random weights" if name == "w6" else arguments.model,
                            "round": round_number,
                            "num_requests": len(items),
                            "num_prompt_tokens": num_prompt_tokens,
                            "num_output_tokens": sum(counts),
                            "elapsed_s": round(elapsed_s, 4),
                            "roofline_s": round(least_s, 4),
                            "limits": vars(limits),
                            **facts,
                        },
                    )
    print_table(rates, bounds)


def print_table(rates: dict[tuple[str, str], list[float]], bounds: dict[str, float]) -> None:
    """Medians, ranges, and the share of the bfloat16 roofline."""
    print("\n| workload | weights | tokens/s | range (runs) | of the roofline |\n| --- | --- | --- | --- | --- |")
    for (name, form), runs in rates.items():
        middle, unit = statistics.median(runs), COUNTS.get(name, "output")
        weights = "bfloat16" if form == "none" else form
        spread = f"{min(runs):.1f} to {max(runs):.1f} ({len(runs)})"
        print(
            f"| {name.upper()}: {PURPOSE[name]} ({unit}) | {weights} | {middle:.1f} | {spread} | {middle / bounds[name]:.0%} |"
        )


if __name__ == "__main__":
    main()
