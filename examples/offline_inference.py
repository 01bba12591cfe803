"""Offline batched inference: the quickstart's example.

python examples/offline_inference.py                     # facebook/opt-125m, from the hub or its cache
python examples/offline_inference.py --model demo        # a small chat model that needs no hub
"""

from __future__ import annotations

import argparse
import sys

from cacheflow import LLM, SamplingParams
from cacheflow.errors import CacheflowError

parser = argparse.ArgumentParser(description="Offline batched inference.")
parser.add_argument("--model", default="facebook/opt-125m", help='A hub name, a folder, a GGUF file, or "demo".')
arguments = parser.parse_args()

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)

try:
    llm = LLM(model=arguments.model)
except CacheflowError as error:
    sys.exit(f"Error: {error}")

# The outputs come in the order of the prompts.
outputs = llm.generate(prompts, sampling_params)

for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
