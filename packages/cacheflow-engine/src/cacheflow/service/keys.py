"""The key that an engine and its frontends share, for connections that leave the machine (CurveZMQ, rfc.zeromq.org/spec/26).

It owns the key's file and what ZeroMQ needs of it. It knows no messages.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from cacheflow.errors import ConfigError

NUM_KEY_BYTES = 32


@dataclass(frozen=True)
class EngineKey:
    """The key pairs of both sides, drawn from one secret: each knows that the other has it too.

    Attributes:
        engine_secret: The engine's secret key, in ZeroMQ's text form (Z85), as are the others.
        engine_public: Its public key.
        client_secret: The secret key that all its clients have.
        client_public: Their public key.
    """

    engine_secret: bytes = field(repr=False)
    engine_public: bytes
    client_secret: bytes = field(repr=False)
    client_public: bytes

    @classmethod
    def read(cls, path: str) -> EngineKey:
        """From a file that `make` has made.

        Raises:
            ConfigError: It can't be read, is none, or others than its owner can read it.
        """
        try:
            text = Path(path).read_text(encoding="ascii")
            mode = os.stat(path).st_mode
            secret = bytes.fromhex(text)
        except OSError as error:
            raise ConfigError(
                f"The engine's key can't be read from {path}: {error.strerror}. `cacheflow engine --engine-key FILE` makes "
                "one; its frontends need a copy."
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path} holds no engine key. Copy the file that the engine uses.") from error
        if len(secret) != NUM_KEY_BYTES:
            raise ConfigError(f"{path} holds no engine key: {len(secret)} bytes, not {NUM_KEY_BYTES}. Copy the engine's file.")
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"Others can read the engine's key {path} (mode {mode & 0o777:o}). Run: chmod 600 {path}")
        return cls(*_key_pair(secret, b"engine"), *_key_pair(secret, b"client"))

    @staticmethod
    def make(path: str) -> None:
        """Writes a new key, unless the file exists. Only its owner can read it.

        Raises:
            ConfigError: It can't be written.
        """
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return
        except OSError as error:
            raise ConfigError(f"The engine's key can't be written to {path}: {error.strerror}.") from error
        with os.fdopen(file, "w", encoding="ascii") as text:
            text.write(secrets.token_hex(NUM_KEY_BYTES) + "\n")

    def secure_client(self, socket: zmq.Socket[Any]) -> None:
        """To be called before the socket connects."""
        socket.curve_serverkey = self.engine_public
        socket.curve_publickey = self.client_public
        socket.curve_secretkey = self.client_secret

    def secure_engine(self, socket: zmq.Socket[Any]) -> None:
        """To be called before the socket binds, and after `admit_clients`: without it whoever knows the public key comes in."""
        socket.curve_server = True
        socket.curve_publickey = self.engine_public
        socket.curve_secretkey = self.engine_secret

    def admit_clients(self, context: zmq.Context[Any]) -> ThreadAuthenticator:
        """Lets in who has the clients' key, and nobody else, until it is stopped."""
        door = ThreadAuthenticator(context)
        door.configure_curve_callback(domain="*", credentials_provider=_Clients(self.client_public))
        door.start()
        return door


class _Clients:
    """Who may come in, in the form that pyzmq asks for."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public_key


def _key_pair(secret: bytes, side: bytes) -> tuple[bytes, bytes]:
    secret_key = z85.encode(hashlib.sha256(b"cacheflow " + side + b"\0" + secret).digest())
    return secret_key, zmq.curve_public(secret_key)
