"""The tests here need a GPU, and say so where there is none. They use torch, transformers, pytest and the packages alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
STATE = f"on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "left out, torch finds no CUDA GPU"
# So that tests can say `from tiny import ...` where tests/conftest.py, which wants more packages, is left out.
sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_report_header() -> str:
    """Which GPU they run on, or why they don't: when this folder is named on the command line."""
    return f"tests/gpu: {STATE}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The same when it is found among others."""
    terminalreporter.write_line(f"tests/gpu: {STATE}")


@pytest.fixture(scope="session")
def gpu_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama whose heads the kernels are compiled for."""
    from tiny import write_tiny_llama

    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "gpu-llama", **sizes)
