"""The tests here need a GPU, and say so where there is none. They use torch, triton, pytest and only this package."""

from __future__ import annotations

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
STATE = f"on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "left out, torch finds no CUDA GPU"


def pytest_report_header() -> str:
    """Which GPU they run on, or why they don't: when this folder is named on the command line."""
    return f"tests/kernels/gpu: {STATE}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The same when it is found among others."""
    terminalreporter.write_line(f"tests/kernels/gpu: {STATE}")
