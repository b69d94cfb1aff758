"""Random numbers by address instead of by state: Philox4x32-10.

John K. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The same (seed, position) gives the
same number in every process, in every batch and after every restart. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

MASK = 0xFFFFFFFF
ROUNDS = 10

Words = npt.NDArray[Any]
Word = TypeVar("Word", int, Words)  # a 32-bit number, or one for each row


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds over four 32-bit words of counter and two of key. Arrays are uint64: no product overflows."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """In [0, 1), with 53 random bits. `seed` is taken modulo 2**64."""
    words = philox4x32((position & MASK, (position >> 32) & MASK, 0, 0), (seed & MASK, (seed >> 32) & MASK))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def uniforms(seeds: Items[int], positions: Items[int]) -> npt.NDArray[np.float64]:
    """`uniform` of each pair, all at once. `[len(seeds)]`."""
    seed = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(position)
    words = philox4x32((position & MASK, position >> 32, zero, zero), (seed & MASK, seed >> 32))
    bits: Words = (words[0] << 32 | words[1]) >> 11
    return bits.astype(np.float64) * 2.0**-53
