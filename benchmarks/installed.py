"""What distributions need: how many are installed for them, and the size of their files.

    python benchmarks/installed.py cacheflow-engine cacheflow-openai       # of the environment of this interpreter
    python benchmarks/installed.py 'llama-cpp-python[server]'

They are found by their declared requirements, themselves included: what is in the environment for another reason, such as pip
or pins for development, doesn't count. It needs the standard library only, so that it runs in any environment.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def installed(names: list[str]) -> tuple[int, float]:
    """Distributions, and MB of their files."""
    sizes: dict[str, float] = {}
    done: set[tuple[str, str]] = set()
    wanted = [_parts(name) for name in names]
    while wanted:
        name, extras = wanted.pop()
        for extra in ["", *extras]:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            try:
                found = distribution(name)
            except PackageNotFoundError:
                continue  # Its marker is for another system, or it was taken out.
            paths = [Path(str(path.locate())) for path in found.files or ()]
            sizes[name] = sum(path.stat().st_size for path in paths if path.is_file()) / 1e6
            for requirement in found.requires or ():
                needs, _, marker = requirement.partition(";")
                asked_by = re.search(r"""extra == ["'](.+?)["']""", marker)
                if (asked_by.group(1) if asked_by else "") == extra:
                    wanted.append(_parts(needs))
    return len(sizes), sum(sizes.values())


def _parts(requirement: str) -> tuple[str, list[str]]:
    """The normalised name, and its extras."""
    matched = re.match(r"\s*([\w.-]+)\s*(?:\[(.*?)\])?", requirement)
    assert matched is not None
    name = re.sub(r"[-_.]+", "-", matched.group(1)).lower()
    return name, [extra.strip() for extra in (matched.group(2) or "").split(",") if extra.strip()]


if __name__ == "__main__":
    count, size_mb = installed(sys.argv[1:])
    print(json.dumps({"num_distributions": count, "install_mb": round(size_mb)}))
