"""Digests are bound to the hand-off, the position and every byte, and to nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from kv_transfer_ends import random_bytes

from pdserve.kv_transfer.digest import block_digests, verify
from pdserve.proto.errors import CorruptKV
from pdserve.proto.types import HandoffId

ID = HandoffId("r", 0, 1)
BLOCKS = random_bytes(6 * 256, 1).view(6, 256)


def test_digests_do_not_depend_on_where_the_blocks_lie() -> None:
    moved = torch.zeros_like(BLOCKS)
    moved[[5, 0, 3]] = BLOCKS[[1, 2, 4]]
    verify(ID, moved, (5, 0, 3), block_digests(ID, BLOCKS, (1, 2, 4)))
    assert block_digests(ID, BLOCKS.numpy(), (1, 2)) == block_digests(ID, BLOCKS, (1, 2))


@pytest.mark.parametrize(
    "other", [replace(ID, attempt=1), replace(ID, epoch=2), replace(ID, request_id="s")], ids=["attempt", "epoch", "id"]
)
def test_the_same_bytes_of_another_hand_off_do_not_pass(other: HandoffId) -> None:
    with pytest.raises(CorruptKV):
        verify(other, BLOCKS, (0, 1), block_digests(ID, BLOCKS, (0, 1)))


def test_equal_blocks_at_other_positions_have_other_digests() -> None:
    same = torch.ones(3, 256, dtype=torch.uint8)
    assert len(set(block_digests(ID, same, (0, 1, 2)))) == 3


@pytest.mark.parametrize("digests", [(), (1,), (1, 2, 3)])
def test_missing_digests_are_failures(digests: tuple[int, ...]) -> None:
    with pytest.raises(CorruptKV, match="digests"):
        verify(ID, BLOCKS, (0, 1), digests)


def test_any_single_flipped_bit_is_found_at_its_position() -> None:
    digests = block_digests(ID, BLOCKS, range(6))
    rng = random.Random(1)
    for _ in range(300):
        broken = BLOCKS.clone()
        position = rng.randrange(6)
        broken[position, rng.randrange(256)] ^= 1 << rng.randrange(8)
        with pytest.raises(CorruptKV, match=f"position {position} "):
            verify(ID, broken, range(6), digests)
