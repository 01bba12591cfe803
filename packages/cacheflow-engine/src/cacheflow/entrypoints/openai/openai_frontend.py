"""`python -m cacheflow.entrypoints.openai.openai_frontend`: the OpenAI-compatible frontend of cacheflow-openai."""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.entrypoints import launch


def main(argv: Sequence[str] | None = None) -> None:
    """Serves `/v1/models` and `/v1/completions` on port 8000 until it is told to end."""
    launch.main("openai", argv)


if __name__ == "__main__":
    main()
