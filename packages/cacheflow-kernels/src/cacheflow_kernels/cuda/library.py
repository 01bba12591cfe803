"""The shared object with the CUDA kernels: whether it can be used here, and its functions with their errors raised.

It loads without a driver, and then says why it can't be used. It knows no operation: `attention`, `blocks` and `rows` declare
the functions that they call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("_cuda.so")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""Element types of the kernels, as primitives.h numbers them."""
MIN_CAPABILITY = (8, 0)
"""The oldest GPUs that the kernels are compiled for."""
POINTER, INTEGER, LONG, REAL = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_DRIVER_TOO_OLD = 35


class KernelError(RuntimeError):
    """CUDA refused a launch or a copy; the message has the kernel's name and CUDA's reason."""


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where the package was installed without it."""
    if not PATH.is_file():
        return None
    library = ctypes.CDLL(str(PATH))
    library.cacheflow_error_text.restype = ctypes.c_char_p
    return library


@cache
def reasons() -> tuple[str, ...]:
    """Why the CUDA kernels can't be used on this machine; empty: they can."""
    library = load()
    if library is None:
        missing = f"the package was installed without its compiled CUDA kernels ({PATH.name})"
        return (f"{missing}: put nvcc 13 on the PATH, then install it again",)
    if torch.version.cuda is None:
        return (f"torch {torch.__version__} is built without CUDA",)
    error = int(library.cacheflow_device_error())
    if error == _DRIVER_TOO_OLD:
        return ("there is no NVIDIA driver, or it is older than CUDA 13 wants (580)",)
    if error:
        return (f"CUDA error {error}: {_text(error)}",)
    if not torch.cuda.is_available():
        return ("torch finds no CUDA device",)
    return ()


def check_device(device: torch.device) -> tuple[str, ...]:
    """`reasons()`, and those that are particular to `device`."""
    if device.type != "cuda":
        return (f"needs a CUDA device, not {device}", *reasons())
    found = reasons()
    if not found and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        found = (f"needs compute capability 8.0, {name} has {capability[0]}.{capability[1]}",)
    return found


def function(name: str, *argtypes: type) -> Callable[..., None]:
    """The library's function `cacheflow_<name>` without its last two parameters, device and stream.

    Its first argument is a tensor: the kernel runs on that tensor's device, in torch's current stream there.
    """

    def call(where: Tensor, *arguments: object) -> None:
        error = _symbol(name, argtypes)(*arguments, *place(where))
        if error:
            raise KernelError(f"{name} failed on {where.device}: CUDA error {error}, {_text(error)}.")

    return call


@cache
def _symbol(name: str, argtypes: tuple[type, ...]) -> Callable[..., int]:
    library = load()
    assert library is not None, "called where reasons() says why not"
    symbol = library[f"cacheflow_{name}"]
    symbol.argtypes, symbol.restype = (*argtypes, INTEGER, POINTER), INTEGER
    return symbol


def place(tensor: Tensor) -> tuple[int, int]:
    """The number of a tensor's device, and torch's current stream there."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def require(valid: bool, name: str, wanted: str, tensor: Tensor) -> None:
    """Refuses an argument that the kernels can't take.

    Raises:
        ValueError: It is not `valid`; the message names it.
    """
    if not valid:
        found = f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())} on {tensor.device}"
        raise ValueError(f"{name} must be {wanted} for the cuda kernels, got {found}.")


def _text(error: int) -> str:
    library = load()
    assert library is not None
    text: bytes = library.cacheflow_error_text(error)
    return text.decode()
