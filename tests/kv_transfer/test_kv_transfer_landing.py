"""Where blocks land: in place between equal workers, converted between others, and never with anything left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pdserve.kv_transfer.landing import Landings
from pdserve.proto.errors import CorruptKV
from pdserve.proto.kv_blocks import elements
from pdserve.proto.types import HandoffId, KVLayout, KVTicket, WorkerRef

LAYOUT = KVLayout("model", "float32", num_layers=2, num_kv_heads=1, head_dim=8, block_size=4)


def ticket(layout: KVLayout, num_tokens: int) -> KVTicket:
    return KVTicket(HandoffId("r", 0, 1), WorkerRef("p", 1, ""), num_tokens, layout, "xxh3", 1.0, "", {})


def pool(layout: KVLayout, num_blocks: int, value: float = float("nan")) -> torch.Tensor:
    """uint8 `[num_blocks, block_bytes]`, every element `value`: what an earlier use left."""
    blocks = torch.zeros((num_blocks, layout.block_bytes), dtype=torch.uint8)
    elements(blocks, layout).fill_(value)
    return blocks


def test_equal_workers_land_in_the_pool_itself() -> None:
    blocks = pool(LAYOUT, 8)
    with Landings(blocks, LAYOUT).open(ticket(LAYOUT, 12), 1, 2, (7, 5, 3)) as landing:
        assert landing.pool.data_ptr() == blocks.data_ptr()
        assert landing.block_ids == (5, 3)


def test_a_failed_transfer_converts_nothing() -> None:
    source = replace(LAYOUT, block_size=8)
    blocks = pool(LAYOUT, 4, 5.0)
    before = blocks.clone()

    def fail() -> None:
        with Landings(blocks, LAYOUT).open(ticket(source, 8), 0, 1, (2, 1)) as landing:
            elements(landing.pool, source).fill_(1.0)
            raise CorruptKV("the digests do not match")

    with pytest.raises(CorruptKV):
        fail()
    assert torch.equal(blocks, before)


@pytest.mark.parametrize("source_size", [2, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 11])
def test_nothing_of_an_earlier_use_is_left_in_the_blocks_of_a_prompt(source_size: int, num_tokens: int) -> None:
    """Slots behind the last token are read by attention, masked; what is not finite there would spoil it."""
    source = replace(LAYOUT, block_size=source_size)
    blocks = pool(LAYOUT, 6)
    block_ids = (4, 1, 3)[: LAYOUT.num_blocks(num_tokens)]
    landings, num_source = Landings(blocks, LAYOUT), source.num_blocks(num_tokens)
    for first in range(num_source):  # block by block, as parts may come
        with landings.open(ticket(source, num_tokens), first, 1, block_ids) as landing:
            elements(landing.pool, source).fill_(float(first + 1))
    landed = elements(blocks[list(block_ids)], LAYOUT).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)  # [slots, ...]
    for token in range(num_tokens):
        assert (landed[token] == token // source_size + 1).all()
    assert (landed[num_tokens:] == 0).all()
