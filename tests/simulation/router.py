"""One simulated router process: the real fleet, connections, pipeline and policy; clients call it directly."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from simulation.loop import Process
from simulation.model import text_of
from simulation.rpc import Rpc
from simulation.scenario import Scenario
from simulation.worker import CONTROLLER

from pdserve.proto.types import SLO
from pdserve.router.admission import Admission
from pdserve.router.connection import Settings
from pdserve.router.fleet import Changes, Fleet
from pdserve.router.metrics import RouterMetrics
from pdserve.router.pipeline import Pipeline
from pdserve.router.policy import POLICIES

RPC_TIMEOUT_S = 2.0
# Numbers for people: they decide nothing, and are dear to set up.
_METRICS = RouterMetrics(CollectorRegistry(), SLO(1000.0, 100.0))


class SimRouter:
    """One life of a router."""

    def __init__(self, name: str, epoch: int, process: Process, scenario: Scenario, rpc: Rpc) -> None:
        self.name = name
        self.epoch = epoch
        self.process = process
        changes = Changes()
        settings = Settings(
            epoch=epoch,
            rpc_timeout_s=RPC_TIMEOUT_S,
            reconnect_s=0.2,
            max_reconnect_s=2.0,
            on_change=changes.notify,
            on_dropped_event=_METRICS.dropped_events.inc,
            open_channel=rpc.open_channel,
        )
        self.fleet = Fleet(CONTROLLER, settings, changes)
        self.pipeline = Pipeline(
            self.fleet,
            POLICIES[scenario.policy],
            Admission(scenario.max_inflight, scenario.max_queued),
            _METRICS,
            epoch=epoch,
            decode=text_of,
            max_buffered_tokens=1024,
            first_turn=scenario.seed,
        )

    def problems(self) -> list[str]:
        """What is left over once nothing should be."""
        found = []
        if self.pipeline.num_inflight or self.pipeline.num_queued:
            found.append("requests are in the admission's books")
        for name in ("_runs", "_waiting", "_aborts"):
            if getattr(self.pipeline, name):
                found.append(f"the pipeline's {name} are not empty")
        for connection in self.fleet.connections:
            if connection._sinks or connection._unseen:
                found.append(f"the connection to {connection.worker_id} remembers requests")
        return [f"{self.name}: {problem}" for problem in found]
