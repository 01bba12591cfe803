"""Between text and token ids, on the client's side: tokenising, incremental detokenising, stop strings, request outputs.

It knows no torch, no engine and no sockets.
"""

from __future__ import annotations

from cacheflow.text.assembler import RequestAssembler
from cacheflow.text.detokenizer import Detokenizer
from cacheflow.text.stop_strings import StopFinder, StopMatch
from cacheflow.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "RequestAssembler", "StopFinder", "StopMatch", "Tokenizer"]
