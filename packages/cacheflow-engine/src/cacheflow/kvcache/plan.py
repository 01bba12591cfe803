"""How large the KV cache is: what memory this process may use, what a block takes, how many blocks fit.

It reads what the operating system grants (control groups, affinity), not what the host has. It allocates nothing.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cacheflow.errors import NotEnoughMemoryError

logger = logging.getLogger(__name__)

GIB = 1 << 30
DEFAULT_SHARE = 0.5
"""Of the memory that is free once the model is loaded; the rest is for activations and for others."""
DEFAULT_MAX_BYTES = 4 * GIB

_MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and usage of a control group, in version 2 and in version 1."""


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still take: the least of the host's free memory and what each control group leaves.

    Args:
        root: Where /proc and /sys/fs/cgroup are found.
    """
    amounts = [int(line.split()[1]) * 1024 for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    for folder in _control_groups(root, "memory"):
        for limit_name, usage_name in _MEMORY_FILES:
            limit, used = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and used is not None:
                # Files that were read lately count as used, but are given up when memory is asked for.
                amounts.append(limit - used + _reclaimable_bytes(folder))
    if not amounts:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min(amounts))


def num_usable_cpus(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, or fewer where a control group grants less time than that.

    Args:
        root: Where /proc and /sys/fs/cgroup are found.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        for line in _lines(folder / "cpu.max"):
            words = line.split()
            quota, period = (None if words[0] == "max" else int(words[0])), int(words[1])
        if quota is not None and quota > 0 and period:
            count = min(count, math.ceil(quota / period))
    return max(1, count)


def bytes_per_block(block_shape: Sequence[int], num_layers: int, dtype_bytes: int) -> int:
    """What one block takes in all layers.

    Args:
        block_shape: Of one layer's cache tensor with a single block, keys and values together.
        num_layers: That this worker owns.
        dtype_bytes: Of one element.
    """
    return math.prod(block_shape) * num_layers * dtype_bytes


def cpu_budget_bytes(kv_cache_memory: float | None, swap_space: float, available_bytes: int) -> int:
    """Memory for the KV cache on a CPU.

    Args:
        kv_cache_memory: The option, in GiB; None: half of what is free, at most 4 GiB.
        swap_space: The option, in GiB: added to it, since there is no other memory to swap to.
        available_bytes: Free once the model is loaded.
    """
    default = min(available_bytes * DEFAULT_SHARE, DEFAULT_MAX_BYTES)
    return int((default if kv_cache_memory is None else kv_cache_memory * GIB) + swap_space * GIB)


def plan_blocks(
    *, budget_bytes: int, available_bytes: int, block_bytes: int, block_size: int, max_model_len: int, max_num_seqs: int
) -> int:
    """How many blocks to make: what the budget holds, but no more than `max_num_seqs` sequences of full length can fill.

    Args:
        budget_bytes: Memory meant for the cache.
        available_bytes: Memory that there is.
        block_bytes: What a block takes in all layers.
        block_size: Tokens of a block.
        max_model_len: Tokens of the longest sequence.
        max_num_seqs: Most sequences at a time.

    Raises:
        NotEnoughMemoryError: One sequence of `max_model_len` does not fit, or there is less memory than was asked for.
    """
    blocks_per_sequence = -(-max_model_len // block_size)
    num_blocks = min(budget_bytes // block_bytes, max_num_seqs * blocks_per_sequence)
    if num_blocks < blocks_per_sequence:
        raise NotEnoughMemoryError(
            f"The KV cache may take {_gib(budget_bytes)} GiB, which hold {num_blocks * block_size} tokens; one sequence of "
            f"{max_model_len} tokens needs {_gib(blocks_per_sequence * block_bytes)} GiB, and {_gib(available_bytes)} GiB are "
            f"free. Lower --max-model-len, or raise --kv-cache-memory (on a GPU --gpu-memory-utilization)."
        )
    if num_blocks * block_bytes > available_bytes:
        raise NotEnoughMemoryError(
            f"The KV cache was to take {_gib(num_blocks * block_bytes)} GiB, but only {_gib(available_bytes)} GiB are free. "
            f"Lower --kv-cache-memory or --swap-space, or lower --max-model-len or --max-num-seqs to need less."
        )
    logger.info(
        "KV cache: %s GiB, %d blocks of %d tokens, %d tokens in all",
        _gib(num_blocks * block_bytes),
        num_blocks,
        block_size,
        num_blocks * block_size,
    )
    return num_blocks


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g}"


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups that may limit it, its own and all above; of version 1 and 2 alike."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controller if controllers else mount
        own = base / path.lstrip("/")
        # Inside a container the path may be the host's, where only the mount itself is visible.
        yield own
        for parent in own.parents:
            if parent == mount.parent or not parent.is_relative_to(base):
                break
            yield parent


def _reclaimable_bytes(folder: Path) -> int:
    statistics = dict(line.split()[:2] for line in _lines(folder / "memory.stat"))
    return int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number that a file holds; None when there is no such file, or it says "max"."""
    lines = _lines(path)
    try:
        return int(lines[0]) if lines else None
    except ValueError:
        return None
