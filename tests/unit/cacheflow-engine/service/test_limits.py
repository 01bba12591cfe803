"""What keeps the engine process within bounds: the backlog, the watchdog, the key's file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import SimulatedExecutor

from cacheflow.config import EngineConfig
from cacheflow.core import EngineCore
from cacheflow.errors import ConfigError, EngineOverloadedError, InvalidRequestError
from cacheflow.service.backlog import MAX_HELD_BYTES, MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, Backlog
from cacheflow.service.keys import EngineKey
from cacheflow.types import EngineRequest, SamplingParams


def request(request_id: str, num_prompt_tokens: int = 4, n: int = 1) -> EngineRequest:
    params = SamplingParams(n=n, max_tokens=4, temperature=1.0, seed=0, ignore_eos=True)
    return EngineRequest(request_id=request_id, prompt_token_ids=[1] * num_prompt_tokens, params=params, arrival_s=0.0)


def make(**limits: int) -> tuple[EngineCore, Backlog]:
    config = EngineConfig(block_size=4, max_num_batched_tokens=64, max_num_seqs=4, **limits)
    core = EngineCore(config, SimulatedExecutor(100, 4, 64))
    return core, Backlog(core, config)


def test_sequences_are_counted_not_requests() -> None:
    core, backlog = make(max_waiting_requests=2)
    core.add(request("a", n=4))
    backlog.check(request("b", n=2))
    with pytest.raises(EngineOverloadedError, match="1 requests with 4 tokens wait already"):
        backlog.check(request("b", n=3))


def test_a_request_for_more_sequences_than_a_deployment_wants_is_refused() -> None:
    core, _ = make(max_n=2)
    core.add(request("a", n=2))
    with pytest.raises(InvalidRequestError, match=r"3 sequences; this engine gives a request at most 2 \(--max-n\)") as raised:
        core.add(request("b", n=3))
    assert raised.value.param == "n"


def test_waiting_tokens_are_limited_but_a_prompt_of_any_size_is_taken_when_nothing_waits() -> None:
    core, backlog = make(max_waiting_tokens=50)
    backlog.check(request("a", 200))
    core.add(request("a", 40))
    backlog.check(request("b", 10))
    with pytest.raises(EngineOverloadedError):
        backlog.check(request("b", 11))


def test_what_requests_carry_is_limited_but_one_of_any_size_is_taken_when_there_is_no_other() -> None:
    _, backlog = make()
    backlog.check(request("a"), MAX_HELD_BYTES + 1)
    backlog.check(request("b"), MAX_HELD_BYTES - 1, 1)
    with pytest.raises(EngineOverloadedError, match=f"at most {MAX_HELD_BYTES} are taken"):
        backlog.check(request("b"), MAX_HELD_BYTES, 1)


def test_when_to_come_again_is_the_backlog_divided_by_what_leaves_it_within_a_range() -> None:
    core, backlog = make()
    assert backlog.retry_after_s == MIN_RETRY_AFTER_S
    for number in range(12):
        core.add(request(str(number), 8))
    core.step()
    backlog.note_step(4.0)
    assert core.scheduler.num_waiting_tokens == 64
    assert backlog.retry_after_s == pytest.approx(64 / (32 / 4))
    backlog.note_step(1000.0)
    assert backlog.retry_after_s == MAX_RETRY_AFTER_S
    while core.has_unfinished:
        core.step()
    assert backlog.retry_after_s == MIN_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("timeout_s", "work", "code"), [(0.1, "time.sleep(1000)", 1), (2, "dog.rest(); time.sleep(3)", 0)], ids=["hangs", "rests"]
)
def test_a_process_whose_step_hangs_is_ended_with_the_stacks_of_its_threads(timeout_s: float, work: str, code: int) -> None:
    program = (
        f"import time\nfrom cacheflow.service.watchdog import Watchdog\ndog = Watchdog({timeout_s})\ndog.renew()\n{work}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert done.returncode == code
    assert ("most recent call first" in done.stderr) is (code == 1)


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "key")
    EngineKey.make(path)
    first = EngineKey.read(path)
    EngineKey.make(path)
    assert EngineKey.read(path) == first
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert first.engine_secret.decode() not in repr(first)
    assert len({first.engine_secret, first.engine_public, first.client_secret, first.client_public}) == 4


def test_a_key_that_is_missing_or_readable_by_others_or_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="can't be read"):
        EngineKey.read(str(path))
    EngineKey.make(str(path))
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        EngineKey.read(str(path))
    path.chmod(0o600)
    for text in ("not hexadecimal", "abcd"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no engine key"):
            EngineKey.read(str(path))
