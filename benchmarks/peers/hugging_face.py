"""transformers for `compare.py`: static batches of 16, padded on the left, each run to its longest output.

With `continuous` behind the folder: its own continuous batching (`generate_batch`), under `no_grad`, as it fails under
`inference_mode`. Only tokens that were asked for are counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import Item

from peers.protocol import Run, serve

PADDED_BATCH = 16


class Padded:
    """transformers' `generate`."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
        # Every batch runs to the number of tokens that is asked for.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def run(self, items: list[Item], n: int) -> tuple[float, list[int]]:
        """The batches in the order of the requests."""
        start = time.perf_counter()
        for first in range(0, len(items), PADDED_BATCH):
            self._generate(items[first : first + PADDED_BATCH], n)
        return time.perf_counter() - start, [n * item.num_output_tokens for item in items]

    def _generate(self, items: Sequence[Item], n: int) -> None:
        longest = max(len(item.prompt_token_ids) for item in items)
        input_ids = torch.zeros(len(items), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, item in enumerate(items):
            input_ids[row, -len(item.prompt_token_ids) :] = torch.tensor(item.prompt_token_ids)
            attention_mask[row, -len(item.prompt_token_ids) :] = 1
        random = {"do_sample": True, "temperature": 0.8, "num_return_sequences": n} if n > 1 else {"do_sample": False}
        with torch.inference_mode():
            self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max(item.num_output_tokens for item in items),
                **random,
            )


class Continuous(Padded):
    """transformers' `generate_batch`."""

    def run(self, items: list[Item], n: int) -> tuple[float, list[int]]:
        """Greedy, one sequence a request."""
        config = self.model.generation_config
        config.max_new_tokens = max(item.num_output_tokens for item in items)
        config.do_sample = False
        start = time.perf_counter()
        with torch.no_grad():
            self.model.generate_batch(inputs=[item.prompt_token_ids for item in items], generation_config=config)
        return time.perf_counter() - start, [item.num_output_tokens for item in items]


def load() -> Run:
    """Warm before the first run."""
    kind = Continuous if sys.argv[2:] == ["continuous"] else Padded
    system = kind(Path(sys.argv[1]))
    system.run([Item(list(range(1000, 1064)), 8)], 1)
    return system.run


if __name__ == "__main__":
    name = "transformers, continuous" if sys.argv[2:] == ["continuous"] else "transformers, padded"
    serve(name, ("transformers", "torch"), load)
