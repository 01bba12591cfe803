from __future__ import annotations

import pytest

from cacheflow.errors import ConfigError
from cacheflow.service.address import parse_address


@pytest.mark.parametrize(
    ("written", "endpoint"),
    [
        ("/run/cacheflow/engine.sock", "ipc:///run/cacheflow/engine.sock"),
        ("ipc:///run/e.sock", "ipc:///run/e.sock"),
        ("127.0.0.1:5000", "tcp://127.0.0.1:5000"),
        ("tcp://localhost:5000", "tcp://127.0.0.1:5000"),
        ("tcp://[::1]:5000", "tcp://[::1]:5000"),
        ("127.1.2.3:0", "tcp://127.1.2.3:0"),
    ],
)
def test_addresses_are_understood_as_people_write_them(written: str, endpoint: str) -> None:
    assert parse_address(written) == endpoint


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:5000", "tcp://*:5000", "10.0.0.1:5000", "tcp://[::]:1", "tcp://example.org:1"]
)
def test_tcp_off_the_loopback_interface_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        parse_address(address)


@pytest.mark.parametrize(
    "address", ["", "engine", "tcp://127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "ipc://relative", "inproc://x"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        parse_address(address)


def test_a_socket_path_that_is_too_long_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="has 121 bytes; the system takes 100"):
        parse_address("/" + "x" * 120)
