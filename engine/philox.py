"""Random numbers by address instead of by state: Philox4x32-10.

John K. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The same (seed, position) gives the
same number in every process, in every batch and after every restart. Knows nothing of tokens.
"""

from __future__ import annotations

MASK = 0xFFFFFFFF
ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds over four 32-bit words of counter and two of key."""
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
