"""Where an engine listens, from what a user wrote to what ZeroMQ takes. It opens no socket."""

from __future__ import annotations

import ipaddress
import os

from cacheflow.errors import ConfigError

MAX_IPC_PATH_BYTES = 100
"""A Unix socket's path has room for 107 bytes."""


def parse_address(address: str, *, has_key: bool = False) -> str:
    """A ZeroMQ endpoint from what a user wrote: `ipc:///path`, `/path`, `tcp://host:port` or `host:port`.

    Args:
        address: It.
        has_key: Both sides have an engine key, so that TCP may leave this machine.

    Raises:
        ConfigError: It is none of these, the path is too long, or the host is not this machine and there is no key.
    """
    if address.startswith("tcp://") or (":" in address and "/" not in address):
        return _tcp_endpoint(address, has_key)
    if has_key:
        raise ConfigError(f"--engine-key is for TCP; {address} is a Unix socket, which its folder guards. Leave it out.")
    path = address.removeprefix("ipc://")
    if not path.startswith("/"):
        raise ConfigError(f"{address!r} is no address. Give ipc:///path/to/socket or tcp://127.0.0.1:port.")
    size = len(os.fsencode(path))
    if size > MAX_IPC_PATH_BYTES:
        raise ConfigError(f"The socket path {path} has {size} bytes; the system takes {MAX_IPC_PATH_BYTES}. Use a shorter one.")
    return f"ipc://{path}"


def _tcp_endpoint(address: str, has_key: bool) -> str:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} is no address. Give tcp://127.0.0.1:port, with a port from 0 to 65535.")
    name = host.strip("[]")
    try:
        is_loopback = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback and not has_key:
        raise ConfigError(
            f"{address} is not on this machine's loopback interface. TCP connections to the engine are neither encrypted nor "
            f"authenticated without a key: give --engine-key FILE on both sides, or use 127.0.0.1, ::1 or localhost."
        )
    return f"tcp://{'127.0.0.1' if name == 'localhost' else host}:{port}"
