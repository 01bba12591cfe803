"""Compiles the C++ and CUDA kernels into plain shared objects, beside their sources.

`hatch_build.py` calls it for a wheel or an editable install. Without hatch, `python compile_kernels.py cuda` builds in place.
It needs nothing but Python and the compilers; it does not know what is in the sources.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent / "src" / "cacheflow_kernels"
# Instruction sets are chosen at run time, function by function, so no -march: the result runs on any x86-64.
CXX_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
CUDA_TARGETS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that get machine code; newer GPUs compile the intermediate code of the last one when it is loaded."""
CUDA_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "--threads=0"),
    *("-Xfatbin", "-compress-all", "-Xfatbin", "-compress-mode=size"),
    *(f"-gencode=arch=compute_{target},code=sm_{target}" for target in CUDA_TARGETS),
    f"-gencode=arch=compute_{CUDA_TARGETS[-1]},code=compute_{CUDA_TARGETS[-1]}",
)


class Part(NamedTuple):
    """One shared object: the folder and pattern of its sources, what compiles it, and what its absence costs."""

    folder: str
    pattern: str
    compiler: str
    flags: tuple[str, ...]
    linker_prefix: str
    cost: str

    def build(self, package: Path = PACKAGE) -> tuple[Path | None, str]:
        """The shared object, compiled unless it is up to date; or None and the reason."""
        folder = package / self.folder
        sources = sorted(folder.glob(self.pattern))
        if not sources:
            return None, "it has no sources"
        digest = hashlib.sha256(repr(self.flags).encode())
        for path in [*sources, *sorted(folder.glob("*.h"))]:
            digest.update(path.name.encode() + path.read_bytes())
        # The linker stores the hash in the file, so that a file tells what it was made of.
        build_id = digest.hexdigest()[:40]
        out = folder / f"_{self.folder}.so"
        if out.is_file() and bytes.fromhex(build_id) in out.read_bytes():
            return out, ""
        # What was made of other sources may not fit the Python code that calls it.
        out.unlink(missing_ok=True)
        compiler = shutil.which(self.compiler)
        if compiler is None:
            return None, f"no {self.compiler}"
        new = out.with_suffix(f".{os.getpid()}.tmp")
        link = f"{self.linker_prefix}--build-id=0x{build_id}"
        command = [compiler, *self.flags, link, "-o", str(new), *map(str, sources)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or [result.stderr.strip()]
            return None, f"{self.compiler} failed: {errors[0]}"
        new.replace(out)
        return out, ""


CPU = Part(
    "cpu",
    "*.cpp",
    os.environ.get("CXX", "g++"),
    CXX_FLAGS,
    "-Wl,",
    "on CPUs the operations run in plain torch, several times slower",
)
CUDA = Part("cuda", "*.cu", "nvcc", CUDA_FLAGS, "-Xlinker=", "on NVIDIA GPUs the Triton kernels serve alone")


def main(names: list[str]) -> int:
    """Builds the parts named, all of them when none is; returns how many could not be built."""
    parts = [part for part in (CPU, CUDA) if not names or part.folder in names]
    failures = 0
    for part in parts:
        out, reason = part.build()
        print(f"{part.folder}: {out if out is not None else f'not compiled ({reason}): {part.cost}'}")
        failures += out is None
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
