"""Has the C++ and CUDA kernels compiled while a wheel, or an editable install, is made.

Both parts are optional: where a compiler is missing the package installs without that part, and one line says so. Nothing of
torch is needed to build. How a part is compiled is in `compile_kernels`.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path
from runpy import run_path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# hatch runs this file by its path, with no folder to import a neighbour from.
_parts = run_path(str(Path(__file__).with_name("compile_kernels.py")))
CPU, CUDA = _parts["CPU"], _parts["CUDA"]


class KernelBuildHook(BuildHookInterface[Any]):
    """Adds what could be compiled to the wheel, and says in one line what could not."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made; for an editable install twice.

        Raises:
            RuntimeError: CACHEFLOW_BUILD_CUDA=1 asked for the CUDA kernels and they can't be compiled.
        """
        package = Path(self.root, "src", "cacheflow_kernels")
        wants_cuda = os.environ.get("CACHEFLOW_BUILD_CUDA")
        missing = []
        for part in (CPU, CUDA):
            if part is CPU and platform.machine() not in ("x86_64", "AMD64"):
                out, reason = None, f"{platform.machine()} is not x86-64"
            elif part is CUDA and wants_cuda == "0":
                out, reason = None, "CACHEFLOW_BUILD_CUDA=0"
            else:
                out, reason = part.build(package)
            if out is not None:
                build_data["artifacts"].append(str(out.relative_to(self.root)))
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            elif part is CUDA and wants_cuda == "1":
                raise RuntimeError(f"CACHEFLOW_BUILD_CUDA=1, and the CUDA kernels can't be compiled: {reason}.")
            else:
                missing.append(f"without the compiled {part.folder} kernels ({reason}): {part.cost}")
        if missing:
            self.app.display_warning(f"cacheflow-kernels installs {'; '.join(missing)}.")
