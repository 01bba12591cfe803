"""The journal that outlives an engine process."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from cacheflow.service.journal import StepJournal, journal_path
from cacheflow.types import EngineRequest, SamplingParams


def request(client_id: str, request_id: str) -> EngineRequest:
    return EngineRequest(
        client_id=client_id, request_id=request_id, prompt_token_ids=[1], params=SamplingParams(), arrival_s=0.0
    )


def test_deaths_are_counted_for_the_requests_of_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal"
    first = StepJournal(path)
    assert first.num_deaths == {}
    first.write([request("a", "1"), request("a", "2"), request("a", "2"), request("b", "1")])
    first.write([request("a", "2")])
    second = StepJournal(path)
    assert second.num_deaths == {("a", "2"): 1}
    second.write([request("b", "1"), request("a", "2")])
    assert StepJournal(path).num_deaths == {("a", "2"): 2, ("b", "1"): 1}


def test_an_engine_that_did_nothing_blames_nobody(tmp_path: Path) -> None:
    StepJournal(tmp_path / "journal")
    assert StepJournal(tmp_path / "journal").num_deaths == {}


def test_an_end_in_order_leaves_no_file(tmp_path: Path) -> None:
    journal = StepJournal(tmp_path / "journal")
    journal.write([request("a", "1")])
    journal.close()
    journal.close()
    assert StepJournal(tmp_path / "journal").num_deaths == {}


def test_a_damaged_journal_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"\xff\xff\xff\xffrubbish")
    assert StepJournal(tmp_path / "journal").num_deaths == {}


def test_a_journal_that_can_t_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    journal = StepJournal(tmp_path / "file" / "journal")
    journal.write([request("a", "1")])
    journal.close()
    assert caplog.text.count("can't be written") == 1
    assert "Not a directory" in caplog.text


def test_a_disk_that_fills_up_ends_the_journal_and_not_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = StepJournal(tmp_path / "journal")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # As good as a full disk.
    try:
        journal.write([request("a", "1")])
        journal.write([request("a", "2")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("can't be written") == 1
    assert not (tmp_path / "journal").exists()


def test_a_shorter_step_overwrites_a_longer_one(tmp_path: Path) -> None:
    journal = StepJournal(tmp_path / "journal")
    journal.write([request("a", str(i)) for i in range(50)])
    journal.write([request("a", "7")])
    assert StepJournal(tmp_path / "journal").num_deaths == {("a", "7"): 1}


def test_the_journal_of_a_unix_socket_lies_beside_it_and_addresses_have_their_own(tmp_path: Path) -> None:
    assert journal_path("ipc:///run/x/e.sock") == Path("/run/x/e.sock.journal")
    assert journal_path("tcp://127.0.0.1:1") != journal_path("tcp://127.0.0.1:2")
