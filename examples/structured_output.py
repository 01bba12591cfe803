"""Text of a given form: JSON of a schema, a date, one of three words.

python examples/structured_output.py        # needs cacheflow-engine[structured]; the demo model needs no hub
"""

from __future__ import annotations

import argparse
import sys

from cacheflow import LLM, SamplingParams, StructuredOutput
from cacheflow.errors import CacheflowError

parser = argparse.ArgumentParser(description="Structured output.")
parser.add_argument("--model", default="demo", help='A hub name, a folder, a GGUF file, or "demo".')
arguments = parser.parse_args()

person = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
questions = [
    ("Ann Lee is 31 years old. As JSON: ", StructuredOutput(json_schema=person)),
    ("The first day of the year 2000, as YYYY-MM-DD: ", StructuredOutput(regex=r"\d{4}-\d{2}-\d{2}")),
    ("'What a wonderful film!' sounds ", StructuredOutput(choices=["positive", "negative", "neutral"])),
]

try:
    llm = LLM(model=arguments.model)
    prompts = [prompt for prompt, _ in questions]
    params = [SamplingParams(temperature=0.0, max_tokens=60, structured=structure) for _, structure in questions]
    for output in llm.generate(prompts, params, use_tqdm=False, raise_errors=True):
        print(f"{output.prompt}{output.outputs[0].text}")
except CacheflowError as error:
    sys.exit(f"Error: {error}")
