"""What memory and cores a process is granted, and how many KV blocks that makes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from cacheflow.errors import NotEnoughMemoryError
from cacheflow.kvcache.plan import (
    GIB,
    available_memory_bytes,
    bytes_per_block,
    cpu_budget_bytes,
    num_usable_cpus,
    plan_blocks,
)

MIB = 1 << 20


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 8388608 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_the_hosts_free_memory_counts(tmp_path: Path) -> None:
    assert available_memory_bytes(_write(tmp_path, {})) == 8 * GIB


def test_a_version_2_group_limits_memory(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
        },
    )
    assert available_memory_bytes(root) == GIB + GIB // 2


def test_a_version_1_group_limits_memory(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/a/memory.stat": f"total_inactive_file {MIB}\n",
        },
    )
    assert available_memory_bytes(root) == GIB + MIB


def test_inside_a_container_the_mount_itself_counts(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/docker-1.scope\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert available_memory_bytes(root) == GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "100\n", "sys/fs/cgroup/memory.current": "200\n"},
    )
    assert available_memory_bytes(root) == 0


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1)])
def test_a_version_2_group_limits_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    root = _write(tmp_path, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": f"{quota}\n"})
    assert num_usable_cpus(root) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("200000", 2)])
def test_a_version_1_group_limits_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": f"{quota}\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
    )
    assert num_usable_cpus(root) == expected


def test_affinity_limits_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert num_usable_cpus(_write(tmp_path, {})) == 2


def test_a_block_takes_keys_and_values_of_all_layers() -> None:
    # SmolLM2-135M in bfloat16: 23,040 bytes a token.
    assert bytes_per_block((1, 16, 2, 3, 64), num_layers=30, dtype_bytes=2) == 16 * 23_040


def test_the_default_budget_is_half_of_what_is_free_and_at_most_4_gib() -> None:
    assert cpu_budget_bytes(None, 0, 3 * GIB) == 1.5 * GIB
    assert cpu_budget_bytes(None, 0, 100 * GIB) == 4 * GIB


def test_options_set_the_budget_and_swap_space_adds_to_it() -> None:
    assert cpu_budget_bytes(0.25, 0, 3 * GIB) == GIB / 4
    assert cpu_budget_bytes(0.25, 1, 3 * GIB) == 1.25 * GIB
    assert cpu_budget_bytes(None, 1, 4 * GIB) == 3 * GIB


SIZES = {"block_bytes": MIB, "block_size": 16, "max_model_len": 100, "max_num_seqs": 4, "available_bytes": 64 * MIB}


def test_the_budget_is_filled_with_whole_blocks() -> None:
    assert plan_blocks(budget_bytes=10 * MIB + 5, **SIZES) == 10


def test_no_more_blocks_are_made_than_all_sequences_can_fill() -> None:
    assert plan_blocks(budget_bytes=60 * MIB, **SIZES) == 4 * 7


def test_a_sequence_that_does_not_fit_is_an_error_with_the_numbers_and_what_to_change() -> None:
    assert plan_blocks(budget_bytes=7 * MIB, **SIZES) == 7
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan_blocks(budget_bytes=7 * MIB - 1, **SIZES)
    for part in ("96 tokens", "100 tokens", "0.00684 GiB", "--max-model-len", "--kv-cache-memory"):
        assert part in str(caught.value)


def test_more_memory_than_there_is_is_an_error() -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"only 0\.00977 GiB are free.*--kv-cache-memory"):
        plan_blocks(budget_bytes=60 * MIB, **{**SIZES, "available_bytes": 10 * MIB})


def test_the_size_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        plan_blocks(budget_bytes=8 * MIB, **SIZES)
    assert [record.getMessage() for record in caplog.records] == [
        "KV cache: 0.00781 GiB, 8 blocks of 16 tokens, 128 tokens in all"
    ]
