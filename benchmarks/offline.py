"""Offline throughput on the workloads W1 to W5, beside transformers' padded batches on W1.

Every run has a fresh engine, so that no run finds the prefixes of an earlier one; loading and a warm-up on other tokens are
not timed. Runs of different systems are interleaved. Figures are only comparable within one invocation: run it alone on the
machine.

    python benchmarks/offline.py                        # everything, three rounds
    python benchmarks/offline.py --short                # a minute: eight requests of W1, short outputs, one round
    python benchmarks/offline.py --workload w1 --rounds 5 --output benchmarks/results/offline.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import Item, surroundings, workload, write

from cacheflow import LLM, SamplingParams
from cacheflow.config import EngineConfig

PURPOSE = {
    "w1": "batched throughput",
    "w2": "one stream",
    "w3": "prefill",
    "w4": "shared prefix",
    "w5": "parallel sampling, n = 4",
}
WARM_UP = Item(list(range(1000, 1064)), 8)
PADDED_BATCH = 16
Run = Callable[[list[Item], int], tuple[float, int]]
"""Takes requests and n; returns the seconds it took and the tokens it generated."""


def run_cacheflow(model: str, items: list[Item], n: int) -> tuple[float, int]:
    """All requests at once through `LLM.generate`."""
    with_n: dict[str, Any] = {"n": n, "temperature": 0.8} if n > 1 else {"temperature": 0.0}
    llm = LLM(model=model, dtype="bfloat16")
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
    return elapsed_s, sum(len(sequence.token_ids) for output in outputs for sequence in output.outputs)


class PaddedTransformers:
    """transformers' `generate` in static batches of 16, padded on the left, each run to its longest output.

    The weights are the same as the engine's, read by its loader. Only tokens that were asked for are counted.
    """

    def __init__(self, model: str) -> None:
        import torch
        import transformers

        from cacheflow.loading.resolve import resolve_model

        files = resolve_model(EngineConfig(model=model))
        config = getattr(transformers, files.hf_config["architectures"][0]).config_class(**files.hf_config)
        self._model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        missing = self._model.load_state_dict(dict(files.loader.tensors(files.path)), strict=False).missing_keys
        if set(missing) - {"lm_head.weight"}:
            raise SystemExit(f"The checkpoint lacks {missing}.")
        self._model.tie_weights()
        # Every batch runs to the number of tokens that is asked for.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def __call__(self, items: list[Item], n: int) -> tuple[float, int]:
        """Runs the batches in the order of the requests."""
        self._generate([WARM_UP])
        start = time.perf_counter()
        for first in range(0, len(items), PADDED_BATCH):
            self._generate(items[first : first + PADDED_BATCH])
        return time.perf_counter() - start, sum(item.num_output_tokens for item in items)

    def _generate(self, items: Sequence[Item]) -> None:
        import torch

        longest = max(len(item.prompt_token_ids) for item in items)
        input_ids = torch.zeros(len(items), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, item in enumerate(items):
            input_ids[row, -len(item.prompt_token_ids) :] = torch.tensor(item.prompt_token_ids)
            attention_mask[row, -len(item.prompt_token_ids) :] = 1
        num_tokens = max(item.num_output_tokens for item in items)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=num_tokens, do_sample=False
            )
        assert out.shape == (len(items), longest + num_tokens)


def shortened(items: list[Item]) -> list[Item]:
    """Eight requests with a quarter of their output: enough to see that everything runs."""
    return [Item(item.prompt_token_ids, max(4, item.num_output_tokens // 4)) for item in items[:8]]


def main() -> None:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what to run; the workloads are tokens of SmolLM2 (default: demo)")
    parser.add_argument("--workload", action="append", choices=list(PURPOSE), help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system on each workload (default: 3)")
    parser.add_argument("--short", action="store_true", help="eight requests of W1, short outputs, one round")
    parser.add_argument("--without-transformers", action="store_true", help="leave transformers' padded batches out")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    names = ["w1"] if arguments.short else arguments.workload or list(PURPOSE)
    rounds = 1 if arguments.short else arguments.rounds

    systems: dict[str, Run] = {"cacheflow": lambda items, n: run_cacheflow(arguments.model, items, n)}
    if "w1" in names and not arguments.without_transformers:
        systems["transformers, padded batch of 16"] = PaddedTransformers(arguments.model)
    facts = surroundings()
    speeds: dict[tuple[str, str], list[float]] = {}
    for round_number in range(rounds):
        for name in names:
            items = shortened(workload(name)) if arguments.short else workload(name)
            n = 4 if name == "w5" else 1
            for system, run in systems.items():
                if system != "cacheflow" and name != "w1":
                    continue
                elapsed_s, num_output_tokens = run(items, n)
                num_prompt_tokens = sum(len(item.prompt_token_ids) for item in items)
                speeds.setdefault((name, system), []).append(num_output_tokens / elapsed_s)
                print(f"{name} {system}: {num_prompt_tokens} + {num_output_tokens} tokens in {elapsed_s:.2f} s", flush=True)
                write(
                    arguments.output,
                    {
                        "benchmark": "offline",
                        "workload": name,
                        "is_short": arguments.short,
                        "system": system,
                        "model": arguments.model,
                        "round": round_number,
                        "num_requests": len(items),
                        "num_prompt_tokens": num_prompt_tokens,
                        "num_output_tokens": num_output_tokens,
                        "elapsed_s": round(elapsed_s, 4),
                        **facts,
                    },
                )
    print_table(speeds)


def print_table(speeds: dict[tuple[str, str], list[float]]) -> None:
    """Medians and ranges, and how many times faster cacheflow is than what ran beside it."""
    print("\n| workload | system | output tokens/s | range | cacheflow is faster by |\n| --- | --- | --- | --- | --- |")
    for (name, system), runs in speeds.items():
        ours = statistics.median(speeds[name, "cacheflow"])
        ratio = "" if system == "cacheflow" else f"{ours / statistics.median(runs):.2f}x"
        spread = f"{min(runs):.1f} to {max(runs):.1f} ({len(runs)})"
        print(f"| {name.upper()}: {PURPOSE[name]} | {system} | {statistics.median(runs):.1f} | {spread} | {ratio} |")


if __name__ == "__main__":
    main()
