"""Decide how a hand-off's blocks travel: over which kind of link, and in which runs of adjacent blocks.

Pure. Knows nothing of how a link works beyond whether the source takes part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdserve.proto.errors import TransferFailed

ONE_SIDED = frozenset({"loopback", "shm", "cuda_ipc"})
"""Kinds whose sink reads the source's memory itself: no `Redeem`, no send."""

SAME_HOST = frozenset({"loopback", "shm", "cuda_ipc"})
"""Kinds that need both workers on one host."""

ON_DEVICE = frozenset({"cuda_ipc", "nccl"})
"""Kinds that move blocks between CUDA devices; the others move host memory. None does both."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How a worker can be reached: its host and the kinds of link it has, which its memory decides."""

    host_id: str
    kinds: frozenset[str]

    @property
    def device(self) -> str:
        """Where its blocks are: "cpu" or "cuda"."""
        return "cuda" if self.kinds & ON_DEVICE else "cpu"


@dataclass(frozen=True, slots=True)
class LinkChoice:
    """`reason`: why kinds that were preferred and whose memory one of the workers has are not taken; "" if none."""

    kind: str
    reason: str


def choose_link(preference: Sequence[str], ours: Reach, theirs: Reach) -> LinkChoice:
    """The first kind in `preference` that both workers can use. Raises `TransferFailed` naming why none fits."""
    obstacles: dict[str, str] = {}
    for kind in preference:
        obstacle = _obstacle(kind, ours, theirs)
        if not obstacle:
            devices = {ours.device, theirs.device}
            reasons = [f"{other}: {why}" for other, why in obstacles.items() if _device(other) in devices]
            return LinkChoice(kind, "; ".join(reasons))
        obstacles[kind] = obstacle
    reasons = [f"{kind}: {why}" for kind, why in obstacles.items()]
    raise TransferFailed(f"no link fits both workers ({'; '.join(reasons)})")


def _obstacle(kind: str, ours: Reach, theirs: Reach) -> str:
    """What keeps the two from using this kind, in one phrase; "" if nothing does."""
    for reach, where in ((ours, "here"), (theirs, "there")):
        if kind not in reach.kinds:
            return f"not open {where}" if _device(kind) == reach.device else f"KV is in {reach.device} memory {where}"
    return "not on one host" if kind in SAME_HOST and ours.host_id != theirs.host_id else ""


def _device(kind: str) -> str:
    return "cuda" if kind in ON_DEVICE else "cpu"


@dataclass(frozen=True, slots=True)
class CopyRun:
    """`num_blocks` blocks that are adjacent on both sides, in the same order."""

    source: int
    target: int
    num_blocks: int


def copy_runs(pairs: Iterable[tuple[int, int]]) -> list[CopyRun]:
    """Fewest runs that copy each (source block, target block) of `pairs`, in order."""
    runs: list[CopyRun] = []
    for source, target in pairs:
        last = runs[-1] if runs else None
        if last and (source, target) == (last.source + last.num_blocks, last.target + last.num_blocks):
            runs[-1] = CopyRun(last.source, last.target, last.num_blocks + 1)
        else:
            runs.append(CopyRun(source, target, 1))
    return runs


@dataclass(frozen=True, slots=True)
class Message:
    """Blocks `first`, `first + 1`, ... of a transfer, in pieces of so many blocks; each piece is sent by itself."""

    first: int
    pieces: tuple[int, ...]

    @property
    def blocks(self) -> slice:
        """Of the transfer."""
        return slice(self.first, self.first + sum(self.pieces))


def plan_messages(
    source_block_ids: Sequence[int], block_bytes: int, message_bytes: int, min_piece_bytes: int
) -> list[Message]:
    """Cut a transfer into messages of at most `message_bytes`, but always one block.

    The pieces of a message are the runs of blocks that are adjacent at the source, so that it sends them as they lie;
    but where such runs have less than `min_piece_bytes` on average, the message is one piece, which the source stages.
    """
    max_blocks = max(1, message_bytes // block_bytes)
    messages = []
    for first in range(0, len(source_block_ids), max_blocks):
        block_ids = source_block_ids[first : first + max_blocks]
        pieces = tuple(run.num_blocks for run in copy_runs(zip(block_ids, range(len(block_ids)), strict=True)))
        is_piecemeal = len(block_ids) * block_bytes < len(pieces) * min_piece_bytes
        messages.append(Message(first, (len(block_ids),) if is_piecemeal else pieces))
    return messages
