"""Which link each prefill and decode worker use between them, and why not a better one. Pure.

The same decision that a decode worker takes for each hand-off, for people to see before there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdserve.kv_transfer.plan import Reach, choose_link
from pdserve.proto.errors import TransferFailed
from pdserve.proto.types import Role, WorkerInfo


@dataclass(frozen=True, slots=True)
class PairLink:
    """`kind` is "" for two workers that cannot exchange KV; `reason` says why not, or why not a better link."""

    source: str
    target: str
    kind: str
    reason: str


def pair_links(preference: Sequence[str], infos: Iterable[WorkerInfo]) -> list[PairLink]:
    """One for each prefill and decode worker, in the order of the fleet."""
    known = list(infos)
    sources = [info for info in known if info.role is Role.PREFILL]
    targets = [info for info in known if info.role is Role.DECODE]
    return [_pair_link(preference, source, target) for source in sources for target in targets]


def _pair_link(preference: Sequence[str], source: WorkerInfo, target: WorkerInfo) -> PairLink:
    names = source.worker.worker_id, target.worker.worker_id
    obstacles = target.layout.obstacles(source.layout)
    if obstacles:
        return PairLink(*names, "", f"their KV layouts differ: {', '.join(obstacles)}")
    try:
        choice = choose_link(preference, _reach(target), _reach(source))
    except TransferFailed as error:
        return PairLink(*names, "", error.message)
    return PairLink(*names, choice.kind, choice.reason)


def _reach(info: WorkerInfo) -> Reach:
    return Reach(info.host_id, frozenset(info.link_address))
