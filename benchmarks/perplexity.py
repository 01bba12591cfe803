"""What a form of the weights costs in perplexity, on a text that no model was trained on.

The text (`workloads/perplexity.txt`, this project's own documentation as it was in November 2026) is cut into pieces of 512
tokens, and each is scored by `prompt_logprobs`. Of two forms the same tokens are compared,
so the change of the mean is known much better than the mean itself: its standard error is printed beside it.

    python benchmarks/perplexity.py
    python benchmarks/perplexity.py --form int8-dynamic --output benchmarks/results/perplexity.jsonl
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

from record import FOLDER, surroundings, write

from cacheflow import LLM, SamplingParams

FORMS = ("int8", "int4", "int8-dynamic")
PIECE = 512


def log_probabilities(model: str, dtype: str, form: str, text: str) -> list[float]:
    """Of every token of the text after the first of its piece."""
    llm = LLM(model=model, dtype=dtype, quantization=form, disable_log_stats=True)
    try:
        token_ids = llm.tokenizer.encode(text)
        pieces = [token_ids[start : start + PIECE] for start in range(0, len(token_ids) - 1, PIECE)]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        outputs = llm.generate(prompt_token_ids=pieces, sampling_params=params, use_tqdm=False)
    finally:
        llm.close()
    found = []
    for output in outputs:
        if output.error or output.prompt_logprobs is None:
            raise SystemExit(f"A piece of the text was not scored: {output.error}")
        for token, entries in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if entries is not None:
                found.append(entries[token])
    return found


def main() -> None:
    """Scores the text once as the checkpoint is and once in each form, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="default: demo")
    parser.add_argument("--dtype", default="bfloat16", help="of all forms (default: bfloat16)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument("--text", type=Path, default=FOLDER / "workloads" / "perplexity.txt", help="default: the project's own")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    arguments = parser.parse_args()
    text, facts = arguments.text.read_text(encoding="utf-8"), surroundings()
    print("| form | tokens | perplexity | change | ± standard error |\n| --- | --- | --- | --- | --- |")
    reference: list[float] = []
    for form in ("none", *arguments.form):
        start = time.perf_counter()
        scores = log_probabilities(arguments.model, arguments.dtype, form, text)
        reference = reference or scores
        differences = [before - after for before, after in zip(reference, scores, strict=True)]
        figures = {
            "perplexity": round(math.exp(-statistics.mean(scores)), 3),
            "change_percent": round(100 * math.expm1(statistics.mean(differences)), 2),
            "error_percent": round(100 * statistics.pstdev(differences) / math.sqrt(len(differences)), 2),
        }
        print(f"| {form} | {len(scores)} | " + " | ".join(map(str, figures.values())) + " |", flush=True)
        line = {"benchmark": "perplexity", "model": arguments.model, "dtype": arguments.dtype, "form": form}
        taken = {"tokens": len(scores), "seconds": round(time.perf_counter() - start, 1)}
        write(arguments.output, line | figures | taken | facts)


if __name__ == "__main__":
    main()
