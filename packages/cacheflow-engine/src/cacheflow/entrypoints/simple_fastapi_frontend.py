"""`python -m cacheflow.entrypoints.simple_fastapi_frontend`: the simple frontend of cacheflow-server."""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.entrypoints import launch


def main(argv: Sequence[str] | None = None) -> None:
    """Serves `POST /generate` on port 8001 until it is told to end."""
    launch.main("simple", argv)


if __name__ == "__main__":
    main()
