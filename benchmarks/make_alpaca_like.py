"""Makes `workloads/alpaca_like.jsonl`: requests like Alpaca's in the PagedAttention paper (input mean 19, output mean 58).

The prompts are windows of the real text in `w1.jsonl` (token ids of SmolLM2); where they start and how long prompts and outputs
are is drawn from a log-normal distribution with seed 0. The file is committed; this script says where it comes from.
"""

from __future__ import annotations

import json
import math
import random

from record import FOLDER, workload

NUM_REQUESTS = 24
SPREAD = 0.7
"""Standard deviation of a length's logarithm: most lengths lie within a factor of two of the median."""


def lengths(draw: random.Random, mean: float, low: int, high: int) -> list[int]:
    """Log-normal lengths within bounds, scaled so that their mean is as asked for."""
    drawn = [draw.lognormvariate(0, SPREAD) for _ in range(NUM_REQUESTS)]
    scale = mean * NUM_REQUESTS / math.fsum(drawn)
    for _ in range(50):
        rounded = [min(high, max(low, round(scale * length))) for length in drawn]
        scale *= mean * NUM_REQUESTS / sum(rounded)
    return rounded


def main() -> None:
    """Writes the file."""
    draw = random.Random(0)
    prompt_lengths, output_lengths = lengths(draw, 19, 4, 96), lengths(draw, 58, 8, 256)
    texts = [item.prompt_token_ids for item in workload("w1")]
    with (FOLDER / "workloads" / "alpaca_like.jsonl").open("w", encoding="utf-8") as file:
        for index, (num_prompt, num_output) in enumerate(zip(prompt_lengths, output_lengths, strict=True)):
            text = draw.choice([text for text in texts if len(text) >= num_prompt])
            start = draw.randrange(len(text) - num_prompt + 1)
            line = {"id": index, "prompt": text[start : start + num_prompt], "out": num_output}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
