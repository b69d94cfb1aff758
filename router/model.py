"""What the router knows of the model: three JSON files and the tokenizer, read once at start.

Knows nothing of weights. Raises ModelError (one line, names the file) for a directory that cannot be served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdserve.proto.errors import ModelError
from pdserve.router.tokenizer import ModelTokenizer, load_tokenizer, read_json

MAX_VOCAB_SIZE = 1 << 24
MAX_CONTEXT_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class Model:
    """`vocab_size` counts the ids that a client may send: the embedding's rows that have a token."""

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    tokenizer: ModelTokenizer | None


def load_model(model_dir: str, served_model_name: str = "") -> Model:
    """Reads `config.json`, `generation_config.json` and the tokenizer's files."""
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ModelError(f"model_dir: {directory} is not a directory")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory.name}: has no config.json")
    config = read_json(directory / "config.json")
    text_config = config.get("text_config")
    dimensions = text_config if isinstance(text_config, dict) else config
    tokenizer = load_tokenizer(directory)
    vocab_size = _dimension(dimensions, "vocab_size", MAX_VOCAB_SIZE)
    return Model(
        name=served_model_name or directory.resolve().name,
        architecture=_architecture(config),
        vocab_size=vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size),
        max_model_len=_dimension(dimensions, "max_position_embeddings", MAX_CONTEXT_TOKENS),
        eos_token_ids=_eos_token_ids(read_json(directory / "generation_config.json"), dimensions, vocab_size),
        tokenizer=tokenizer,
    )


def _dimension(config: Mapping[str, object], key: str, high: int) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise ModelError(f"config.json: {key} must be an integer from 1 to {high}")
    return value


def _architecture(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _eos_token_ids(generation: Mapping[str, object], config: Mapping[str, object], vocab_size: int) -> tuple[int, ...]:
    """`generation_config.json` wins over `config.json`; both may give one id or a list."""
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and 0 <= token_id < vocab_size for token_id in ids):
        raise ModelError("eos_token_id: not ids of the vocabulary")
    return tuple(sorted(set(ids)))
