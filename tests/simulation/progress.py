"""Finds requests that somebody waits for and nobody works on, and those that somebody works on and nobody waits for.

The first would be told to nobody and end by their deadline only: a notice that was never sent. The second hold memory
until their deadline: an abort that was never sent. Looks at the books of routers and workers from time to time; a
silence of the network is over after the keepalives' time, and what lasts longer than that and a margin is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulation.network import KEEPALIVE_S
from simulation.worker import SimWorker

from pdserve.kv_transfer.reservation import Phase
from pdserve.proto.types import HandoffId

if TYPE_CHECKING:
    from simulation.world import World

PATIENCE_S = KEEPALIVE_S[1] + 5.0
WAITS_FOR_THE_SOURCE = (Phase.RESERVED, Phase.WAITING)
ABORTS_MAY_BE_LOST = frozenset({"loss", "cuts"})


class Progress:
    """Owner of what looked wrong, and since when."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._since_s: dict[str, float] = {}

    def look(self) -> None:
        now_s = self._world.loop.now_s
        seen = [*self._forgotten(), *self._orphans()]
        self._since_s = {why: self._since_s.get(why, now_s) for why in seen}
        for why, since_s in self._since_s.items():
            if now_s - since_s >= PATIENCE_S:
                self._world.trace.violate("progress", f"{why} since {since_s:.2f} s")

    def _runs(self) -> list[Any]:
        """What living routers wait for."""
        routers = self._world.routers.values()
        return [run for one in routers if not one.process.is_dead for run in one.pipeline._runs.values()]

    def _forgotten(self) -> list[str]:
        return [f"{run.id}: {why}, and nobody was told," for run in self._runs() if (why := self._why_forgotten(run))]

    def _why_forgotten(self, run: Any) -> str:
        """Why nothing can come of it any more, or ""."""
        completion = run.inbox.completion
        names = list(run.legs)
        if completion.over or not all(name in run.calls and run.calls[name].done() for name in names):
            return ""
        legs = {name: self._leg(name, run.legs[name].info.worker.generation) for name in names}
        works = {name: leg is not None and leg.works_on(run.id) for name, leg in legs.items()}
        if not any(works.values()):
            return "no worker works on it any more"
        decode = legs[completion.decode_id]
        if not completion.split or decode is None or decode.requests.decode_role is None:
            return ""
        entry = decode.requests.decode_role._table.reservations.get(run.id)
        if entry is not None and entry.phase in WAITS_FOR_THE_SOURCE and not works[completion.prefill_id]:
            return f"{completion.decode_id} waits for {completion.prefill_id}, which does not work on it"
        return ""

    def _leg(self, name: str, generation: int) -> SimWorker | None:
        worker = self._world.workers.get(name)
        if worker is None or worker.process.is_dead or worker.info.worker.generation != generation:
            return None
        return worker

    def _orphans(self) -> list[str]:
        if ABORTS_MAY_BE_LOST & self._world.scenario.kinds:
            return []
        wanted = {run.id for run in self._runs()}
        return [
            f"{worker.plan.worker_id} goes on with {id} though nobody waits for it"
            for worker in self._world.workers.values()
            if not worker.process.is_dead and not worker.process.is_frozen
            for id in worker.requests._live.all()
            if id not in wanted and _is_of(id, worker)
        ]


def _is_of(id: HandoffId, worker: SimWorker) -> bool:
    """Not those that it only keeps for somebody else to fetch: they have their own time limits."""
    return worker.works_on(id)
