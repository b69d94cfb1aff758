"""Device digests are the CPU's, for every size of block, and see what went wrong."""

from __future__ import annotations

import random

import torch
from gpu.proof import conclude

from pdserve.kv_transfer.digest import ON_DEVICE, Digester
from pdserve.proto.types import HandoffId

HANDOFF, LAYOUT = HandoffId("request", 1, 7), 0x0123_4567_89AB_CDEF
SIZES = [(7, 1), (7, 3), (9, 8), (33, 100), (64, 4096), (40, 65_541), (17, 1 << 20), (3, (5 << 20) + 8)]


def prove() -> str:
    digester, rng, num_compared, num_seen = Digester(ON_DEVICE), random.Random(1), 0, 0
    for num_blocks, block_bytes in SIZES:
        host = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8)
        device = host.cuda()
        ids = rng.sample(range(num_blocks), num_blocks)
        first = rng.randrange(1000)
        wanted = digester.digests(HANDOFF, LAYOUT, first, host, ids)
        assert digester.digests(HANDOFF, LAYOUT, first, device, ids) == wanted, f"{num_blocks} x {block_bytes}"
        num_compared += num_blocks
        for _ in range(40):
            row, byte, bit = rng.randrange(num_blocks), rng.randrange(block_bytes), 1 << rng.randrange(8)
            device[row, byte] ^= bit
            found = digester.digests(HANDOFF, LAYOUT, first, device, ids)
            wrong = [ids[i] for i in range(num_blocks) if found[i] != wanted[i]]
            assert wrong == [row], f"a flipped bit of block {row} shows in {wrong}"
            device[row, byte] ^= bit
            num_seen += 1
    return (
        f"{num_compared} digests of {len(SIZES)} block sizes equal the CPU's; {num_seen} of {num_seen} bit flips seen"
    )


if __name__ == "__main__":
    conclude(prove)
