"""What a client needs to know of the served model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TokenizerData:
    """A tokenizer as data, so that a client needs no model files.

    Attributes:
        tokenizer_json: The `tokenizers` library's serialised form. Its own post-processor is not used: `add_bos` says it all.
        chat_template: Jinja source, or None.
        special_tokens: Names as the chat template uses them ("bos_token", "eos_token", …) to their text.
        bos_token_id: Or None.
        eos_token_ids: Those that end a text, the tokenizer's and the generation configuration's.
        add_bos: Whether the BOS token goes before a text.
    """

    tokenizer_json: str
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    add_bos: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """All that a client needs to know of the served model.

    Attributes:
        model: The name it was asked for under.
        architecture: The model class's name in the `cacheflow.models` group.
        dtype: Of the weights' arithmetic, such as "bfloat16".
        vocab_size: Rows of the logits; a token id is below it.
        max_model_len: Most tokens of prompt and output together.
        max_num_seqs: Most sequences at a time, so the most of one request.
        tokenizer: The tokenizer as data.
        engine_version: Of the engine's distribution.
    """

    model: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    tokenizer: TokenizerData
    engine_version: str
