"""From a model's name to its weights, configuration and tokenizer. Importing this package costs no torch."""

from __future__ import annotations

from cacheflow.loading.resolve import tokenizer_data

__all__ = ["tokenizer_data"]
