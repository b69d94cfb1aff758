"""A worker's KV blocks in the model: who uses each, and whose KV it holds.

The real pool's rules: a block is in one use, and freeing what is not there to be freed is a fault of ours. The lowest
free blocks are taken first, so that a block is in use again as soon as it can be. Knows nothing of why blocks move.
"""

from __future__ import annotations

from dataclasses import replace

from modelcheck.system import System
from modelcheck.vocabulary import GARBAGE, Block, BlockUse


class Pool:
    """Changed during one step. `broken` is the first violated property, or ""."""

    def __init__(self, system: System, name: str, blocks: tuple[Block, ...]) -> None:
        self.blocks = list(blocks)
        self.broken = ""
        self._system = system
        self._name = name

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(index for index, block in enumerate(self.blocks) if block.use is BlockUse.FREE)

    def of(self, request: int, use: BlockUse) -> tuple[int, ...]:
        return tuple(index for index, block in enumerate(self.blocks) if (block.use, block.owner) == (use, request))

    def contents(self, block_ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.blocks[block_id].content for block_id in block_ids)

    def take(self, num_blocks: int, use: BlockUse, request: int) -> tuple[int, ...]:
        taken = self.free[:num_blocks]
        for block_id in taken:
            self.blocks[block_id] = Block(use, request, GARBAGE)
        return taken

    def move(self, block_ids: tuple[int, ...], use: BlockUse) -> None:
        for block_id in block_ids:
            self.blocks[block_id] = replace(self.blocks[block_id], use=use)

    def write(self, block_id: int, content: int) -> None:
        self.blocks[block_id] = replace(self.blocks[block_id], content=content)

    def release(self, block_ids: tuple[int, ...], use: BlockUse, request: int) -> None:
        """The bytes stay until somebody writes there."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if (block.use, block.owner) != (use, request):
                name = self._system.setting.label(request)
                self.break_("S2", f"{self._name} frees block {block_id} of {name} as {use}: {self.describe(block_id)}")
            self.blocks[block_id] = Block(content=block.content)

    def describe(self, block_id: int) -> str:
        block = self.blocks[block_id]
        return f"it is {block.use}" + (f" for {self._system.setting.label(block.owner)}" if block.owner >= 0 else "")

    def break_(self, name: str, why: str) -> None:
        self.broken = self.broken or f"{name}: {why}"
