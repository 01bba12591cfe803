"""The GGUF container: metadata and the list of tensors, read with every size checked against the file before it is used.

A count, length, dimension or offset in a file is an input like any other: one that the file can't hold is refused before
anything is allocated for it. This module does not know what the entries mean. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cacheflow.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MIN_ENTRY_BYTES = 13
"""An entry is at least an empty key's length, a type and one byte."""
_MIN_TENSOR_BYTES = 32
"""A tensor is at least an empty name's length, a number of dimensions, one dimension, a type and an offset."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor's bytes lie.

    Attributes:
        shape: As in torch, the slowest axis first.
        type_id: Its number in ggml's list of types.
        start: The first byte in the file.
        num_bytes: How many there are.
    """

    shape: tuple[int, ...]
    type_id: int
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the weights.

    Attributes:
        metadata: Entries by key: numbers, booleans, text, and lists of them.
        tensors: Tensors by name.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path, block_sizes: Callable[[int], tuple[int, int] | None]) -> GGUFHeader:
    """Reads and checks everything before the weights.

    Args:
        path: The file.
        block_sizes: Elements and bytes of one block of a ggml type, or None if there is no such type.

    Raises:
        CheckpointError: The file is not GGUF, is truncated or corrupt, or asks for more than it holds.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).header(block_sizes)
    except (OSError, ValueError) as error:  # An empty file can't be mapped: ValueError.
        raise CheckpointError(f"{path} can't be read: {error}. Fetch the file again.") from error


class _Reader:
    """A cursor over the file's bytes that can't leave it."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 0

    def header(self, block_sizes: Callable[[int], tuple[int, int] | None]) -> GGUFHeader:
        if self._content[:4] != _MAGIC:
            self._fail("it does not begin with GGUF")
        self._at = 4
        file_version = self._number("I")
        if file_version not in _VERSIONS:
            self._fail(f"its version is {file_version}, and versions {_VERSIONS} in little-endian order are supported")
        num_tensors = self._count("tensors", _MIN_TENSOR_BYTES)
        num_entries = self._count("metadata entries", _MIN_ENTRY_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._text()
            metadata[key] = self._value(self._number("I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._text()
            if name in infos:
                self._fail(f"the tensor {name!r} is listed twice")
            infos[name] = self._tensor_info(name)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            self._fail(f"general.alignment is {alignment!r}")
        data_start = -(-self._at // alignment) * alignment
        tensors = {name: self._place(name, *info, data_start, block_sizes) for name, info in infos.items()}
        return GGUFHeader(metadata, tensors)

    def _tensor_info(self, name: str) -> tuple[tuple[int, ...], int, int]:
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            self._fail(f"the tensor {name!r} has {num_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(num_dimensions))[::-1]
        return shape, self._number("I"), self._number("Q")

    def _place(
        self,
        name: str,
        shape: tuple[int, ...],
        type_id: int,
        offset: int,
        data_start: int,
        block_sizes: Callable[[int], tuple[int, int] | None],
    ) -> GGUFTensor:
        """Checks that a tensor lies inside the file. Python's integers don't overflow, so no product can hide its size."""
        sizes = block_sizes(type_id)
        if sizes is None:
            self._fail(f"the tensor {name!r} is of type {type_id}, which is not known")
        block_elements, block_bytes = sizes
        if 0 in shape or shape[-1] % block_elements:
            self._fail(f"the tensor {name!r} has the shape {list(shape)}, with rows that are no multiple of {block_elements}")
        start, num_bytes = data_start + offset, math.prod(shape) // block_elements * block_bytes
        if start + num_bytes > len(self._content):
            self._fail(f"the tensor {name!r} {list(shape)} would end at byte {start + num_bytes}")
        return GGUFTensor(shape, type_id, start, num_bytes)

    def _value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self._number(_SCALARS[type_id])
        if type_id == _STRING:
            return self._text()
        if type_id != _ARRAY:
            self._fail(f"an entry has the type {type_id}, which is not known")
        item_type = self._number("I")
        if item_type == _STRING:
            return [self._text() for _ in range(self._count("texts in a list", 8))]
        if item_type not in _SCALARS:
            self._fail(f"a list has items of type {item_type}, which is not supported")
        item = struct.Struct("<" + _SCALARS[item_type])
        count = self._count("numbers in a list", item.size)
        return [value for (value,) in item.iter_unpack(self._bytes(count * item.size))]

    def _count(self, what: str, min_bytes: int) -> int:
        """A number of things of which each takes at least `min_bytes`."""
        count: int = self._number("Q")
        if count * min_bytes > len(self._content) - self._at:
            self._fail(f"it claims {count} {what}, but only {len(self._content) - self._at} bytes are left")
        return count

    def _number(self, code: str) -> Any:
        item = struct.Struct("<" + code)
        return item.unpack(self._bytes(item.size))[0]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", errors="replace")

    def _bytes(self, count: int) -> bytes:
        if count > len(self._content) - self._at:
            self._fail(f"it ends where {count} more bytes should be")
        start, self._at = self._at, self._at + count
        return self._content[start : self._at]

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(
            f"{self._path} ({len(self._content)} bytes) is truncated or corrupt: {reason}, at byte {self._at}. Fetch it again."
        )
