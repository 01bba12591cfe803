"""The launcher of frontends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cacheflow.entrypoints import launch
from cacheflow.errors import PluginError


def test_a_frontend_that_is_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_plugins", lambda group: {})
    with pytest.raises(PluginError, match="pip install ./packages/cacheflow-server"):
        launch.frontend_command("simple")
    with pytest.raises(PluginError, match="The frontend 'other' is not installed"):
        launch.frontend_command("other")


def test_a_program_whose_frontend_is_missing_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "find_plugins", lambda group: {})
    with pytest.raises(SystemExit) as end:
        launch.main("openai", [])
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "Error: The frontend 'openai' is not installed. In a clone of cacheflow: pip install ./packages/cacheflow-openai\n"
    )


@pytest.mark.parametrize("name", ["simple", "openai"])
def test_a_frontends_command_has_its_own_options_and_the_engines(name: str) -> None:
    options = [parameter.name for parameter in launch.frontend_command(name).params]
    assert {"host", "port", "max_body_bytes", "engine", "model", "max_num_seqs"} <= set(options)
    assert len(options) == len(set(options))


def test_a_flag_of_the_original_that_is_gone_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        launch.main("simple", ["--use-np-weights"])
    assert end.value.code == 2
    assert "There is no --use-np-weights any more: safetensors files are memory-mapped" in capsys.readouterr().err


def test_a_server_may_have_more_connections_than_a_shell_gives_it_files() -> None:
    program = (
        "import resource\n"
        "from cacheflow.entrypoints.http_server import MOST_FILES, SPARE_FILES, allow_many_connections, most_connections\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "allow_many_connections()\nsoft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]\n"
        "assert soft == (MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)), (soft, hard)\n"
        "assert most_connections() == soft - SPARE_FILES  # with which it can start another engine"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
