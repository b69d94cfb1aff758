"""Decide how a hand-off's blocks travel: over which kind of link, and in which runs of adjacent blocks.

Pure. Knows nothing of how a link works beyond whether the source takes part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdserve.proto.errors import TransferFailed

ONE_SIDED = frozenset({"loopback", "shm"})
"""Kinds whose sink reads the source's memory itself: no `Redeem`, no send."""

SAME_HOST = frozenset({"shm"})
"""Kinds that need both workers on one host."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How a worker can be reached: its host and the kinds of link it has."""

    host_id: str
    kinds: frozenset[str]


def choose_link(preference: Sequence[str], ours: Reach, theirs: Reach) -> str:
    """The first kind in `preference` that both workers can use. Raises `TransferFailed` naming why none fits."""
    problems = []
    for kind in preference:
        if kind not in ours.kinds:
            problems.append(f"{kind}: not open here")
        elif kind not in theirs.kinds:
            problems.append(f"{kind}: not open there")
        elif kind in SAME_HOST and ours.host_id != theirs.host_id:
            problems.append(f"{kind}: not on one host")
        else:
            return kind
    raise TransferFailed(f"no link fits both workers ({'; '.join(problems)})")


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
