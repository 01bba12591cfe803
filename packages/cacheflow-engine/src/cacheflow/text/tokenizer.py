"""A tokenizer made from `TokenizerData`: text to token ids and back, and the text and bytes of single tokens.

It runs on the `tokenizers` library alone, so a frontend needs neither transformers nor torch. It knows no chat templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import tokenizers

from cacheflow.errors import CheckpointError, InvalidRequestError
from cacheflow.text.detokenizer import Detokenizer, PieceTable
from cacheflow.text.pieces import TokenPieces
from cacheflow.types import TokenizerData


class Tokenizer:
    """Encodes and decodes for one model.

    Args:
        data: The tokenizer as data.
        model_vocab_size: Rows of the model's logits, where known. Models often have more than their tokenizer has tokens:
            ids in between are valid and stand for no text.

    Raises:
        CheckpointError: The tokenizer's data can't be read.
    """

    def __init__(self, data: TokenizerData, model_vocab_size: int = 0) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.tokenizer_json)
        except Exception as error:  # The library raises nothing more particular.
            raise CheckpointError(
                f"The tokenizer can't be read ({error}). Fetch the model's files again, or name another with --tokenizer."
            ) from error
        # Saved settings of a training run, which would cut or lengthen prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.data = data
        self._model_vocab_size = model_vocab_size
        self._special_ids = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._pieces = TokenPieces(self._tokenizer)
        self._all_inside = PieceTable(self._pieces.inside)
        self._all_at_start = PieceTable(self._pieces.at_start)
        self._plain_inside = PieceTable(self._plain_piece)

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, or None."""
        return self.data.bos_token_id

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a text."""
        return self.data.eos_token_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that steer the model rather than being text."""
        return self._special_ids

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are below it: the tokenizer's, or the model's where that is larger."""
        largest_id = max(self._tokenizer.get_vocab().values(), default=-1)
        return max(largest_id + 1, self._model_vocab_size)

    def min_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, found without tokenising it; 0 if nothing is known."""
        return self._pieces.min_tokens(text.encode())

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are recognised.

        Args:
            text: Any text.
            add_bos: Whether the BOS token goes before it, unless it already begins with it; None: as the model wants it.

        Raises:
            InvalidRequestError: `text` is not valid Unicode.
        """
        try:
            # A batch of one, because that is done without the interpreter's lock: other threads go on meanwhile.
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:  # What the library says to half of a surrogate pair, which JSON can carry.
            raise InvalidRequestError(
                "The text is not valid Unicode: it has half of a surrogate pair, or is not text. Send well-formed text.",
                param="prompt",
            ) from error
        bos = self.data.bos_token_id
        wants_bos = self.data.add_bos if add_bos is None else add_bos
        if wants_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with U+FFFD for bytes that are not valid UTF-8.

        Raises:
            InvalidRequestError: An id is out of range.
        """
        for token_id in ids:
            self._check(token_id)
        detokenizer = self.detokenizer(skip_special_tokens)
        return "".join(map(detokenizer.add, ids)) + detokenizer.flush()

    def detokenizer(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> Detokenizer:
        """For a sequence that grows.

        Args:
            skip_special_tokens: Leave them out of the text.
            context: What comes before the sequence and is not part of its text. Behind a text a first word keeps its space,
                which SentencePiece-like tokenizers drop at the start of one.
        """
        inside = self._plain_inside if skip_special_tokens else self._all_inside
        has_begun = any(inside[token_id] for token_id in context)
        return Detokenizer(inside, None if has_begun else self._all_at_start)

    def token_text(self, token_id: int) -> str:
        """The text of one token inside a text: " a" for "Ġa". Bytes that are no whole character show as U+FFFD.

        Raises:
            InvalidRequestError: The id is out of range.
        """
        self._check(token_id)
        piece = self._all_inside[token_id]
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes that every id stands for inside a text, in the order of ids: `vocab_size` of them."""
        return [self._pieces.inside(token_id) for token_id in range(self.vocab_size)]

    def _plain_piece(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self._pieces.inside(token_id)

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise InvalidRequestError(f"Token id {token_id} is out of range: this model's ids are 0 to {self.vocab_size - 1}.")
