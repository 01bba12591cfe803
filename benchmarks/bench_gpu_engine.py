"""The whole engine on a GPU: the shapes of Llama-3.2-1B and Llama-3.1-8B with random weights, in bfloat16.

Beside it on the same files: itself without CUDA graphs, itself without steps made ahead, and transformers' continuous batching
(`generate_batch`), each in a process of its own; and the least time that the work can take at the card's bandwidth (of a copy)
and peak (of a matrix product), both measured in the same run, as `roofline.py` has it. `gpu.sh` runs it; alone:

    PYTHONPATH=$(python benchmarks/in_place.py in-place) python benchmarks/bench_gpu_engine.py --shape 1b
    … --device cpu --short     # a tiny shape: whether all of it works
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, Item, surroundings, write
from roofline import Limits, Shape, bound_s

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": LLAMA
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    },
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "cacheflow": {},
    "cacheflow, no CUDA graphs": {"enforce_eager": True},
    "cacheflow, step by step": {"run_ahead": "never"},
    "transformers, continuous": {},
}
WORKLOADS = {"decode": "output", "one stream": "output", "prefill": "prompt"}
"""And which tokens their rates count."""


def items_of(workload: str, is_short: bool) -> list[Item]:
    """The requests: token ids that follow no pattern, below 512."""
    count, num_prompt, num_output = {"decode": (128, 128, 256), "one stream": (1, 128, 256), "prefill": (32, 2048, 1)}[workload]
    if is_short:
        count, num_prompt, num_output = min(count, 4), num_prompt // 16, min(num_output, 6)
    return [Item([2 + (i * 7919 + j * j * 31 + j) % 500 for j in range(num_prompt)], num_output) for i in range(count)]


def shape_of(config: dict[str, Any]) -> Shape:
    """As the bound needs it."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, head_size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    body = layers * (hidden * head_size * (2 * heads + 2 * kv_heads) + 3 * hidden * inner)
    head = config["vocab_size"] * hidden
    return Shape(body=body, head=head, layers=layers, heads=heads, kv_heads=kv_heads, head_size=head_size)


def write_model(folder: Path, config: dict[str, Any], device: torch.device) -> None:
    """`config.json`, `model.safetensors` with random weights, and a tokenizer of one word: prompts are token ids."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    hidden, inner, head_size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_size, config["num_key_value_heads"] * head_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns in (
            ("self_attn.q_proj", q_size, hidden),
            ("self_attn.k_proj", kv_size, hidden),
            ("self_attn.v_proj", kv_size, hidden),
            ("self_attn.o_proj", hidden, q_size),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        tensors[name] = (values.fill_(1.0) if len(shape) == 1 else values.normal_(0, 0.02)).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))


def measure_limits(device: torch.device) -> Limits:
    """A copy within memory, bytes read plus bytes written, and a product of square matrices in bfloat16."""
    is_gpu = device.type == "cuda"
    source = torch.ones(1 << (30 if is_gpu else 24), dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best_s(lambda: target.copy_(source), device) / 1e9
    size = 8192 if is_gpu else 512
    matrix = torch.randn(size, size, device=device).bfloat16()
    peak = 2 * size**3 / _best_s(lambda: matrix @ matrix, device) / 1e9
    return Limits(vector_gflops=0.0, matrix_gflops=round(peak, 1), read_gb_s=round(bandwidth, 1))


def _best_s(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def cacheflow(folder: Path, device: str, **options: Any) -> Callable[[list[Item]], float]:
    """Seconds of all requests at once; nothing is found in the cache of an earlier round."""
    from cacheflow import LLM, SamplingParams

    llm = LLM(
        model=str(folder), dtype="bfloat16", device=device, load_format="safetensors", enable_prefix_caching=False,
        max_num_batched_tokens=8192, **options,
    )  # fmt: skip

    def run(items: list[Item]) -> float:
        params = [SamplingParams(temperature=0.0, max_tokens=item.num_output_tokens, ignore_eos=True) for item in items]
        prompts = [item.prompt_token_ids for item in items]
        start = time.perf_counter()
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
        elapsed_s = time.perf_counter() - start
        for output, item in zip(outputs, items, strict=True):
            if output.error or len(output.outputs[0].token_ids) != item.num_output_tokens:
                raise SystemExit(f"A request gave {len(output.outputs[0].token_ids)} tokens: {output.error}")
        return elapsed_s

    return run


def transformers_continuous(folder: Path, device: str) -> Callable[[list[Item]], float]:
    """What `generate_batch` does, under `no_grad` as it fails under `inference_mode`; start and warm-up are not counted."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    config = model.generation_config
    config.eos_token_id, config.pad_token_id, config.do_sample = None, 0, False

    def run(items: list[Item]) -> float:
        num_tokens = config.max_new_tokens = items[0].num_output_tokens
        with torch.no_grad(), model.continuous_batching_context_manager(generation_config=config, timeout=5) as manager:
            start = time.perf_counter()
            manager.add_requests(inputs=[item.prompt_token_ids for item in items], max_new_tokens=num_tokens)
            num_finished = 0
            while num_finished < len(items):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise SystemExit(f"It ended with {num_finished} of {len(items)} requests finished.")
                if result is not None and result.is_finished():
                    if len(result.generated_tokens) != num_tokens:
                        raise SystemExit(f"A request gave {len(result.generated_tokens)} tokens: {result.error}")
                    num_finished += 1
            return time.perf_counter() - start

    return run


def run_system(system: str, folder: Path, device: str, is_short: bool, rounds: int) -> None:
    """In the child: a line of JSON for each workload."""
    ours = system.startswith("cacheflow")
    run = cacheflow(folder, device, **SYSTEMS[system]) if ours else transformers_continuous(folder, device)
    for workload in WORKLOADS:
        items = items_of(workload, is_short)
        run(items)  # Kernels are compiled and graphs captured.
        times = []
        for _ in range(rounds):
            gc.collect()
            times.append(run(items))
        print(json.dumps({"workload": workload, "seconds": times}), flush=True)


def measure(system: str, folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], bool]:
    """Seconds of each workload, from a child, and whether it came to its end."""
    command = [sys.executable, __file__, "--system", system, "--folder", str(folder), "--device", options.device]
    command += ["--rounds", str(options.rounds), *(["--short"] if options.short else [])]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith('{"workload"')]
    if child.returncode:
        print(f"{system}: ended with {child.returncode}; what it wrote above says why.")
    return {line["workload"]: line["seconds"] for line in lines}, child.returncode == 0


def main() -> None:
    """Writes each shape's files, runs all systems on them, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="default: 1b and 8b; with --short: tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--short", action="store_true", help="few requests, short outputs, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    parser.add_argument("--system", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU: nothing was measured.")
    if options.short:
        options.rounds = 1
    if options.system:
        run_system(options.system, options.folder, options.device, options.short, options.rounds)
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    device = torch.device(options.device)
    limits, around = measure_limits(device), surroundings()
    is_ours_complete = True
    print(
        f"limits of {options.device}: {limits.read_gb_s:.0f} GB/s copied, {limits.matrix_gflops / 1000:.2f} TFLOP/s", flush=True
    )
    for name in options.shape or (["tiny"] if options.short else ["1b", "8b"]):
        shape = shape_of(SHAPES[name])
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), SHAPES[name], device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            for system in SYSTEMS:
                found, is_complete = measure(system, Path(folder), options)
                is_ours_complete &= is_complete or not system.startswith("cacheflow")
                for workload, times in found.items():
                    items = items_of(workload, options.short)
                    counted = WORKLOADS[workload]
                    tokens = sum(len(i.prompt_token_ids) if counted == "prompt" else i.num_output_tokens for i in items)
                    seconds, bound = statistics.median(times), bound_s(items, 1, shape, limits)
                    print(
                        f"{name:<5} {workload:<11} {system:<26} {tokens / seconds:10.0f} {counted} tokens/s  "
                        f"{bound / seconds:6.1%} of the limit",
                        flush=True,
                    )
                    line = {
                        "benchmark": "gpu engine",
                        "device": options.device,
                        "shape": f"{name}, random weights, bfloat16",
                        "workload": workload,
                        "implementation": system,
                        "seconds": times,
                        "tokens_per_second": tokens / seconds,
                        "counted": counted,
                        "bound_s": bound,
                        "limits": {"copy_gb_s": limits.read_gb_s, "matmul_gflops": limits.matrix_gflops},
                    }
                    write(options.output, around | line)
    raise SystemExit(not is_ours_complete)


if __name__ == "__main__":
    main()
