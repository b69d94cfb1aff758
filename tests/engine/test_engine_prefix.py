"""Prefix keys: equal exactly when all tokens up to the block's end are equal."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from pdserve.engine.prefix import KEY_BYTES, PrefixKeys, block_keys

TOKENS = st.lists(st.integers(0, 3), max_size=20)


@given(left=TOKENS, right=TOKENS, block_size=st.integers(1, 5))
def test_keys_are_equal_as_far_as_the_full_blocks_are(left: list[int], right: list[int], block_size: int) -> None:
    left_keys, right_keys = list(block_keys(left, block_size)), list(block_keys(right, block_size))
    assert len(left_keys) == len(left) // block_size
    for place, (one, other) in enumerate(zip(left_keys, right_keys, strict=False)):
        end = (place + 1) * block_size
        assert (one == other) == (left[:end] == right[:end])
        assert len(one) == KEY_BYTES
    assert len(set(left_keys)) == len(left_keys)


@given(tokens=TOKENS, block_size=st.integers(1, 5), cuts=st.lists(st.integers(0, 20), max_size=4))
def test_keys_of_a_growing_sequence_are_those_of_the_whole(tokens: list[int], block_size: int, cuts: list[int]) -> None:
    keys = PrefixKeys(block_size)
    for num_tokens in sorted(min(cut, len(tokens)) for cut in cuts):
        num_blocks = num_tokens // block_size
        assert keys.of(tokens[:num_tokens], num_blocks) == list(block_keys(tokens, block_size))[:num_blocks]
    assert keys.of(tokens, len(tokens) // block_size) == list(block_keys(tokens, block_size))


def test_the_key_chains_token_ids_of_eight_bytes() -> None:
    first, second = block_keys([1, 2, 70000, 4, 5], block_size=2)
    packed = [b"".join(token.to_bytes(8, "little") for token in pair) for pair in ((1, 2), (70000, 4))]
    assert first == hashlib.blake2b(packed[0], digest_size=16).digest()
    assert second == hashlib.blake2b(first + packed[1], digest_size=16).digest()


def test_nothing_behind_the_last_key_drawn_is_hashed() -> None:
    class Counted(list[int]):
        num_read = 0

        def __getitem__(self, index: slice) -> list[int]:  # type: ignore[override]
            self.num_read += 1
            return super().__getitem__(index)

    tokens = Counted(range(100))
    assert next(block_keys(tokens, 10))
    assert tokens.num_read == 1
