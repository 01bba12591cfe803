"""Every option of the engine, once: a typed field with its unit, its range and its help.

The command line, `LLM`'s keyword arguments and the docs' tables are generated from these fields. This module reads no files
and knows no devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cacheflow.errors import ConfigError

DEFAULT_MODEL = "facebook/opt-125m"


def option(
    default: Any,
    help: str,  # noqa: A002 - the word that command-line libraries use
    *,
    choices: Iterable[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str | None = None,
    flags: Iterable[str] = (),
    is_secret: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: Its default.
        help: One sentence.
        choices: The only values, where they are few.
        minimum: The smallest value.
        maximum: The largest value.
        unit: Of the number.
        flags: More names on the command line, such as "-tp".
        is_secret: Its value must not stand in a log or a message.
    """
    metadata = {
        "help": help,
        "choices": None if choices is None else tuple(choices),
        "minimum": minimum,
        "maximum": maximum,
        "unit": unit,
        "flags": tuple(flags),
    }
    return field(default=default, repr=not is_secret, metadata=metadata)


def flag_of(name: str) -> str:
    """The command-line flag of a field: `max_num_seqs` → `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def validate_options(options: Any) -> None:
    """Checks every field of an options dataclass against its choices and range.

    Raises:
        ConfigError: Naming the option, the value and what is allowed.
    """
    for entry in fields(options):
        value, rules = getattr(options, entry.name), entry.metadata
        if value is None or "help" not in rules:
            continue
        if rules["choices"] is not None and value not in rules["choices"]:
            raise ConfigError(f"{flag_of(entry.name)} must be one of {', '.join(rules['choices'])}, got {value!r}.")
        low, high = rules["minimum"], rules["maximum"]
        if low is None and high is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{flag_of(entry.name)} must be a number, got {value!r}.")
        if not (low is None or value >= low) or not (high is None or value <= high):
            allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
            unit = f" {rules['unit']}" if rules["unit"] else ""
            raise ConfigError(f"{flag_of(entry.name)} must be {allowed}{unit}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of an engine. The names are the original CacheFlow's wherever it had one.

    Raises:
        ConfigError: A value out of range, or two that don't go together.
    """

    model: str = option(DEFAULT_MODEL, 'A hub name, a folder, a GGUF file, or "demo" (SmolLM2-135M-Instruct).', flags=("-m",))
    tokenizer: str | None = option(None, "A hub name or a folder to take the tokenizer from. Default: the model's own.")
    download_dir: str | None = option(None, "The hub's cache folder. Default: the hub library's.")
    load_format: str = option("auto", "The weight loader: auto, or a name in the cacheflow.weight_loaders group.")
    use_dummy_weights: bool = option(False, "Random weights; only the configuration is read.")
    dtype: str = option(
        "auto",
        "Of weights and arithmetic. auto: the checkpoint's own where the device computes in it, else the next wider.",
        choices=("auto", "default", "half", "float16", "bfloat16", "float", "float32"),
    )
    quantization: str = option(
        "none",
        "How matrices are kept: none (in dtype), int8 or int4 (weights, groups of 32), int8-dynamic (weights and activations).",
        choices=("none", "int8", "int4", "int8-dynamic"),
        flags=("-q",),
    )
    device: str = option("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "Where dummy weights, and seeds that requests leave out, come from.", minimum=0, maximum=2**63 - 1)
    max_model_len: int | None = option(
        None, "Most of prompt and output together. Default: the model's own.", minimum=1, unit="tokens"
    )
    block_size: int = option(16, "Token slots of a KV block.", minimum=1, maximum=256, unit="tokens")
    kv_cache_memory: float | None = option(
        None, "Memory for the KV cache on a CPU. Default: half of what is free after loading, at most 4.", minimum=0, unit="GiB"
    )
    swap_space: float = option(
        0.0,
        "Host memory for blocks that find no room on the device; on a CPU it just adds to the KV cache.",
        minimum=0,
        unit="GiB",
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of a GPU's memory for weights, activations and KV cache.", minimum=0.01, maximum=1
    )
    max_num_batched_tokens: int = option(2048, "Token budget of a step.", minimum=1, unit="tokens")
    prompt_chunk_size: int = option(
        512,
        "Prompt tokens of a step in which sequences decode: fewer keep the streams even, more end long prompts sooner.",
        minimum=1,
        unit="tokens",
    )
    max_num_seqs: int = option(256, "Most sequences in a step.", minimum=1, unit="sequences")
    max_n: int = option(128, "Most sequences that one request may ask for (n or best_of).", minimum=1, maximum=128)
    max_waiting_requests: int = option(
        4096,
        "Sequences (a request's n or best_of) that may wait beside those that --max-num-seqs lets run; more are refused. "
        "For servers.",
        minimum=0,
        unit="sequences",
    )
    max_waiting_tokens: int = option(
        1_000_000, "Tokens of the requests that wait; more are refused. For servers.", minimum=1, unit="tokens"
    )
    step_timeout: float = option(
        300.0, "A step that takes longer hangs: the engine process ends, and is started again. 0: never.", minimum=0, unit="s"
    )
    enable_prefix_caching: bool = option(True, "Keep the blocks of finished requests findable for others.")
    scheduling_policy: str = option("fair", "A name in the cacheflow.schedulers group.")
    attention_backend: str = option("auto", "auto, or a name in the cacheflow.attention_backends group.")
    op_provider: str = option("auto", "auto, or a name in the cacheflow.op_providers group.")
    executor: str = option("auto", "auto, or a name in the cacheflow.executors group.")
    tensor_parallel_size: int = option(1, "Devices that share each layer.", minimum=1, flags=("-tp",))
    pipeline_parallel_size: int = option(1, "Groups of devices that share the layers.", minimum=1, flags=("-pp",))
    enforce_eager: bool = option(False, "No CUDA graphs: a GPU gets every kernel of every step from the host.")
    run_ahead: str = option(
        "auto",
        "Make a step of decodes while the one before runs, with its tokens still on the device. auto: on a GPU.",
        choices=("auto", "always", "never"),
    )
    num_threads: int | None = option(
        None, "CPU threads. Default: OMP_NUM_THREADS, else the cores that this process may use.", minimum=1
    )
    profile: bool = option(False, "Log where the time of steps goes, every 1,000 steps and at the end.")
    trace: str | None = option(None, "A file for a trace of the steps, written at the end; ui.perfetto.dev shows it.")
    disable_log_stats: bool = option(False, "No statistics line every 5 seconds.")
    disable_log_requests: bool = option(False, "No log line per request.")

    def __post_init__(self) -> None:
        validate_options(self)
        if self.max_num_seqs > self.max_num_batched_tokens:
            object.__setattr__(self, "max_num_seqs", self.max_num_batched_tokens)
        if self.trace is not None and (Path(self.trace).is_dir() or not Path(self.trace).parent.is_dir()):
            raise ConfigError(f"--trace {self.trace} can't be written: it must be a file in a folder that is there.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Builds a config from keyword arguments.

        Raises:
            ConfigError: An unknown name, with the closest known one.
        """
        known = {entry.name for entry in fields(cls)}
        for name in values:
            if name not in known:
                import difflib

                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else f" Known options: {', '.join(sorted(known))}."
                raise ConfigError(f"Unknown option {name!r}.{hint}")
        return cls(**values)
