"""What all tests share: one thread, no network, a cache folder of their own, and tiny models on disk."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports torch or the hub library; child processes inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_users_cache = os.environ.get("CACHEFLOW_CACHE")
_cache = tempfile.TemporaryDirectory(prefix="cacheflow-tests-")
os.environ["CACHEFLOW_CACHE"] = _cache.name

# The same examples every time, and none judged by how busy the machine is.
settings.register_profile("cacheflow", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cacheflow")

# What a shell runs in the background ignores Ctrl-C, and so would the programs that tests send it to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# So that tests can say `from tiny import ...`.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Gives a test the same random tensors whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama: safetensors, tokenizer.json, chat template; float32."""
    from tiny import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context of 32,768 tokens: to fill it takes 20 s and more, so that tests can look meanwhile."""
    from tiny import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("models") / "long-llama", max_position_embeddings=32768)


@pytest.fixture(scope="session")
def scripted_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that says what `scripted` has it say, tool calls among it."""
    from scripted import write_scripted_llama

    return write_scripted_llama(tmp_path_factory.mktemp("models") / "scripted-llama")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's GGUF file, which `./run fetch` has put into the user's cache."""
    from cacheflow.loading.demo import demo_file

    with pytest.MonkeyPatch.context() as patch:
        if _users_cache is None:
            patch.delenv("CACHEFLOW_CACHE")
        else:
            patch.setenv("CACHEFLOW_CACHE", _users_cache)
        return demo_file()


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny OPT with the files of facebook/opt-125m: .bin, vocab.json, merges.txt; float16."""
    from tiny import write_tiny_opt

    return write_tiny_opt(tmp_path_factory.mktemp("models") / "tiny-opt")


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache folder that holds a tiny `facebook/opt-125m`; pass it as `download_dir`, or as HF_HUB_CACHE to a child."""
    from tiny import write_tiny_opt_in_hub_cache

    return write_tiny_opt_in_hub_cache(tmp_path_factory.mktemp("hub-cache"))
