"""Makes the packages of this repository usable from their sources where nothing can be installed.

The engine finds its own parts, as everybody's, by entry points, which Python reads from what an installation writes. This
writes them into a folder for PYTHONPATH, and prints the whole PYTHONPATH. It needs Python 3.11.

    export PYTHONPATH=$(python benchmarks/in_place.py FOLDER)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tomllib

PACKAGES = Path(__file__).parents[1] / "packages"
NAMES = ("cacheflow-engine", "cacheflow-kernels")


def write_metadata(name: str, folder: Path) -> None:
    """Name, version and entry points of one package."""
    project = tomllib.loads((PACKAGES / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = folder / f"{name.replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    groups = project.get("entry-points", {})
    lines = [line for group, entries in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in entries.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Writes both and prints the path."""
    folder = Path(sys.argv[1]).resolve()
    for name in NAMES:
        write_metadata(name, folder)
    print(os.pathsep.join(map(str, (folder, *(PACKAGES / name / "src" for name in NAMES)))))


if __name__ == "__main__":
    main()
