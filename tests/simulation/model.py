"""The simulated model: what every token must be, and the KV that every prefix of tokens must have.

A completion's tokens depend on the seed, the request and the position, so that an answer can be checked without
knowing how it came about. KV of a token depends on that of the token before it and on the token: wrong KV anywhere
spoils all that is computed from it. Knows nothing of blocks, of engines or of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pdserve.proto.types import SamplingParams

VOCAB_SIZE = 64
NO_KV = (0, 0)
KV = tuple[int, int]
"""Of one token: its key and its value, 8 bytes each."""


class SimModel:
    """One model, the same on every worker of a run."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[tuple[KV, int], KV] = {}

    def token(self, request_id: str, index: int, sampling: SamplingParams) -> int:
        """Token `index` of the completion; a stop token only where one is allowed."""
        digest = hashlib.blake2b(f"{self._seed}/{request_id}/{index}".encode(), digest_size=8).digest()
        token = int.from_bytes(digest, "little") % VOCAB_SIZE
        while index < sampling.min_tokens and token in sampling.stop_token_ids:
            token = (token + 1) % VOCAB_SIZE
        return token

    def completion(self, request_id: str, sampling: SamplingParams) -> list[int]:
        """All tokens that the workers compute: up to a stop token or the length."""
        tokens: list[int] = []
        while len(tokens) < sampling.max_tokens:
            tokens.append(self.token(request_id, len(tokens), sampling))
            if len(tokens) > sampling.min_tokens and tokens[-1] in sampling.stop_token_ids:
                break
        return tokens

    def kv(self, previous: KV, token: int) -> KV:
        """KV of a token behind one with `previous`; `NO_KV` before the first."""
        found = self._known.get((previous, token))
        if found is None:
            words = (*previous, token)
            digest = hashlib.blake2b(b"".join(word.to_bytes(8, "little") for word in words), digest_size=16).digest()
            found = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
            self._known[previous, token] = found
        return found


def text_of(token_ids: Sequence[int]) -> str:
    """The tokenizer of the simulation: one letter for each token."""
    return "".join(chr(ord("a") + token % 26) for token in token_ids)
