"""Digests are bound to the hand-off, the position, the layout and every byte, and to nothing else, by any algorithm."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import pytest
import torch
from link_contract import random_bytes

from pdserve.kv_transfer.digest import KEYED, ON_DEVICE, Digester
from pdserve.proto.errors import CorruptKV, LayoutMismatch
from pdserve.proto.types import HandoffId

ID = HandoffId("r", 0, 1)
LAYOUT = 7
KEY = bytes(range(32))
BLOCK_BYTES = 263  # no multiple of a word
BLOCKS = random_bytes(6 * BLOCK_BYTES, 1).view(6, BLOCK_BYTES)
DIGESTERS = [Digester("xxh3"), Digester(KEYED, KEY), Digester(ON_DEVICE)]


@pytest.fixture(params=DIGESTERS, ids=lambda digester: digester.algorithm)
def digester(request: pytest.FixtureRequest) -> Digester:
    assert isinstance(request.param, Digester)
    return request.param


def digests(digester: Digester, blocks: torch.Tensor, block_ids: Sequence[int] = range(6)) -> tuple[int, ...]:
    return digester.digests(ID, LAYOUT, 0, blocks, block_ids)


def test_a_digest_is_an_unsigned_64_bit_number(digester: Digester) -> None:
    found = digests(digester, BLOCKS)
    assert len(set(found)) == 6
    assert all(0 <= digest < 1 << 64 for digest in found)
    assert max(found) > 1 << 63 or min(found) < 1 << 61  # spread over all of it


def test_digests_do_not_depend_on_where_the_blocks_lie(digester: Digester) -> None:
    moved = torch.zeros(8, BLOCK_BYTES, dtype=torch.uint8)
    moved[[5, 0, 3]] = BLOCKS[[1, 2, 4]]
    expected = digester.digests(ID, LAYOUT, 3, BLOCKS, (1, 2, 4))
    digester.checker(ID, LAYOUT, 3, expected, 3)(0, moved, (5, 0, 3))
    unaligned = BLOCKS.flatten()[1 : 1 + 5 * BLOCK_BYTES].view(5, BLOCK_BYTES)
    assert digests(digester, unaligned, (2, 3)) == digests(digester, unaligned.clone(), (2, 3))


def test_digests_do_not_depend_on_how_a_part_is_cut(digester: Digester) -> None:
    whole = digests(digester, BLOCKS)
    assert whole == digests(digester, BLOCKS, (0, 1)) + digester.digests(ID, LAYOUT, 2, BLOCKS, (2, 3, 4, 5))
    check = digester.checker(ID, LAYOUT, 0, whole, 6)
    check(4, BLOCKS, (4, 5))
    check(0, BLOCKS, range(4))


def test_many_blocks_have_the_digests_that_each_has_alone(digester: Digester) -> None:
    """More than are computed at a time."""
    blocks = random_bytes(20 * 70_000, 2).view(20, 70_000)
    alone = [digester.digests(ID, LAYOUT, position, blocks, (position,))[0] for position in range(20)]
    assert list(digester.digests(ID, LAYOUT, 0, blocks, range(20))) == alone


@pytest.mark.parametrize(
    "other", [ID._replace(attempt=1), ID._replace(epoch=2), ID._replace(request_id="s")], ids=["attempt", "epoch", "id"]
)
def test_the_same_bytes_of_another_hand_off_do_not_pass(digester: Digester, other: HandoffId) -> None:
    with pytest.raises(CorruptKV):
        digester.checker(other, LAYOUT, 0, digests(digester, BLOCKS))(0, BLOCKS, (0, 1))


def test_the_same_bytes_of_another_layout_or_position_do_not_pass(digester: Digester) -> None:
    expected = digests(digester, BLOCKS)
    with pytest.raises(CorruptKV):
        digester.checker(ID, LAYOUT + 1, 0, expected)(0, BLOCKS, (0, 1))
    with pytest.raises(CorruptKV, match="position 1 "):
        digester.checker(ID, LAYOUT, 1, expected)(0, BLOCKS, (0, 1))


def test_equal_blocks_at_other_positions_have_other_digests(digester: Digester) -> None:
    for value in (0, 1):
        same = torch.full((3, 256), value, dtype=torch.uint8)
        assert len(set(digests(digester, same, range(3)))) == 3


def test_missing_and_surplus_digests_are_failures(digester: Digester) -> None:
    expected = digests(digester, BLOCKS)
    with pytest.raises(CorruptKV, match="5 digests"):
        digester.checker(ID, LAYOUT, 0, expected[:5])(3, BLOCKS, (3, 4, 5))
    for wrong in ((), expected[:5], (*expected, 1)):
        with pytest.raises(CorruptKV, match=f"6 blocks but {len(wrong)} digests"):
            digester.checker(ID, LAYOUT, 0, wrong, 6)


def test_any_single_flipped_bit_is_found_at_its_position(digester: Digester) -> None:
    check = digester.checker(ID, LAYOUT, 0, digests(digester, BLOCKS))
    rng = random.Random(1)
    for _ in range(300):
        broken = BLOCKS.clone()
        position = rng.randrange(6)
        broken[position, rng.randrange(BLOCK_BYTES)] ^= 1 << rng.randrange(8)
        with pytest.raises(CorruptKV, match=f"position {position} "):
            check(0, broken, range(6))


# What sums could miss: the same flip twice, words that change places, runs of zeros, what is added and taken away.


def test_the_same_bit_flipped_in_two_words_is_found(digester: Digester) -> None:
    """For every bit of a word, the highest above all, which plain sums of products lose."""
    block = random_bytes(4096, 3).view(1, 4096)
    expected = digests(digester, block, (0,))
    rng = random.Random(2)
    for bit in range(64):
        for _ in range(20):
            broken = block.clone()
            for word in rng.sample(range(512), rng.choice((2, 4))):
                broken[0, word * 8 + bit // 8] ^= 1 << bit % 8
            assert digests(digester, broken, (0,)) != expected


@pytest.mark.parametrize("unit_bytes", [1, 4, 8, 256, 2048])
def test_pieces_that_change_places_are_found(digester: Digester, unit_bytes: int) -> None:
    block = random_bytes(4096, 4).view(1, 4096)
    expected = digests(digester, block, (0,))
    rng = random.Random(3)
    for _ in range(200):
        i, j = rng.sample(range(4096 // unit_bytes), 2)
        pieces = block.view(-1, unit_bytes).clone()
        pieces[[i, j]] = pieces[[j, i]]
        same = torch.equal(pieces.view(1, 4096), block)
        assert (digests(digester, pieces.view(1, 4096), (0,)) == expected) == same


def test_runs_of_zeros_and_repeated_pieces_are_found(digester: Digester) -> None:
    block = random_bytes(4096, 5).view(1, 4096)
    expected = digests(digester, block, (0,))
    rng = random.Random(4)
    for _ in range(200):
        first, num_bytes = rng.randrange(4000), rng.randrange(8, 96)
        zeroed, repeated = block.clone(), block.clone()
        zeroed[0, first : first + num_bytes] = 0
        repeated[0, first : first + num_bytes] = block[0, : repeated[0, first : first + num_bytes].numel()]
        assert digests(digester, zeroed, (0,)) != expected
        assert torch.equal(repeated, block) or digests(digester, repeated, (0,)) != expected


def test_what_moves_from_one_word_to_another_is_found(digester: Digester) -> None:
    words = torch.arange(1000, 2000, dtype=torch.int32)
    expected = digests(digester, words.view(torch.uint8).view(1, -1), (0,))
    rng = random.Random(5)
    for _ in range(300):
        i, j = rng.sample(range(1000), 2)
        moved, delta = words.clone(), rng.randrange(1, 1000)
        moved[i] += delta
        moved[j] -= delta
        assert digests(digester, moved.view(torch.uint8).view(1, -1), (0,)) != expected


def test_random_blocks_do_not_collide(digester: Digester) -> None:
    """Small numbers in few words: all sums are of few small terms."""
    blocks = torch.zeros(20_000, 16, dtype=torch.uint8)
    for i in range(20_000):
        blocks[i, i % 16], blocks[i, (i // 16) % 16] = 1 + i % 251, 1 + i // 256
    unique = torch.unique(blocks, dim=0)
    seen = {digester.digests(ID, LAYOUT, 0, unique, (i,))[0] for i in range(0, len(unique), 7)}
    assert len(seen) == len(range(0, len(unique), 7))


# Values that both ends must agree on, whatever their version of this module.


def test_the_multilinear_digest_is_what_its_definition_says() -> None:
    """In plain numbers, for a block of three words and a tail of one byte."""
    data = bytes(range(200, 213))
    keys, mask = [], (1 << 64) - 1
    for i in range(1, 5):
        z = i * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        keys.append((z ^ z >> 31) | 1)
    words = [int.from_bytes(data[i : i + 4].ljust(4, b"\0"), "little", signed=True) for i in range(0, 13, 4)]
    total = sum(word * key for word, key in zip(words, keys, strict=True)) & mask
    block = torch.tensor(list(data), dtype=torch.uint8).view(1, -1)
    other = torch.zeros(1, 8, dtype=torch.uint8)  # the sum as a block: a hash of the same eight bytes and seed
    other.view(torch.int64)[0, 0] = total - (total >> 63 << 64)
    assert Digester(ON_DEVICE).digests(ID, LAYOUT, 5, block, (0,)) == Digester("xxh3").digests(
        ID, LAYOUT, 5, other, (0,)
    )


def test_the_keyed_digest_is_blake2b_of_hand_off_position_and_bytes() -> None:
    name = str(ID).encode()
    handoff = len(name).to_bytes(4, "little") + LAYOUT.to_bytes(8, "little") + name
    message = handoff + (9).to_bytes(8, "little") + bytes(BLOCKS[2].tolist())
    expected = hashlib.blake2b(message, digest_size=8, key=KEY, person=b"pdserve-kv").digest()
    found = Digester(KEYED, KEY).digests(ID, LAYOUT, 9, BLOCKS, (2,))
    assert found == (int.from_bytes(expected, "little"),)


def test_another_key_gives_other_digests() -> None:
    expected = Digester(KEYED, KEY).digests(ID, LAYOUT, 0, BLOCKS, (0,))
    assert Digester(KEYED, KEY[::-1]).digests(ID, LAYOUT, 0, BLOCKS, (0,)) != expected


def test_an_algorithm_of_another_version_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="crc32"):
        Digester("crc32")


@pytest.mark.parametrize("digester", DIGESTERS[:2], ids=["xxh3", KEYED])
def test_device_memory_is_not_brought_to_the_host_for_an_algorithm_of_the_host(digester: Digester) -> None:
    with pytest.raises(LayoutMismatch, match="meta memory"):
        digester.digests(ID, LAYOUT, 0, torch.empty(2, 8, dtype=torch.uint8, device="meta"), (0,))
