"""The controller's Prometheus metrics: the fleet by role and state, read from the registry when scraped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pdserve.cluster.registry import MemberState, Registry
from pdserve.proto.metrics_server import MetricsServer
from pdserve.proto.types import Role


class ControllerMetrics(Collector):
    """Owner of the endpoint. Counts at the moment of the scrape: nothing to keep up to date."""

    def __init__(self, fleet: Registry) -> None:
        self._fleet = fleet
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._server: MetricsServer | None = None

    def serve(self, host: str) -> str:
        """Serve `/metrics` on a free port of `host`; its address."""
        self._server = MetricsServer(host, 0, self._registry)
        return self._server.address

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        members = Counter((member.role, member.state) for member in self._fleet.members)
        family = GaugeMetricFamily("pdserve_fleet_workers", "Workers by role and state.", labels=("role", "state"))
        for role in Role:
            for state in MemberState:
                family.add_metric((role, state), members[role, state])
        yield family
        yield GaugeMetricFamily("pdserve_fleet_version", "Grows with every change of the fleet.", self._fleet.version)
