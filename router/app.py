"""One router put together: model, fleet, pipeline, gRPC server, health, reflection, metrics endpoint.

    starting -> serving -> (stop) NOT_SERVING, refuse new requests, grace for those in flight -> closed

Health is SERVING only while the fleet can serve. Knows nothing of signals, of files or of the command line.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable

import grpc.aio
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from pdserve.proto import inference_pb2
from pdserve.proto import inference_pb2_grpc as rpc
from pdserve.proto.errors import ConfigError, StartupError
from pdserve.proto.metrics_server import MetricsServer
from pdserve.proto.types import SLO
from pdserve.router.admission import Admission
from pdserve.router.config import RouterConfig, RouterProcessConfig
from pdserve.router.connection import Settings
from pdserve.router.fleet import Changes, Fleet
from pdserve.router.metrics import RouterMetrics
from pdserve.router.model import Model, load_model
from pdserve.router.pipeline import Pipeline
from pdserve.router.policy import POLICIES
from pdserve.router.server import InferenceServicer
from pdserve.router.status import StatusInterceptor

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
GENERATE = f"/{SERVICE}/Generate"
# Calls that are not generations (health, metadata) keep a share of the server under overload.
NUM_SPARE_CALLS = 256
STOP_GRACE_S = 1.0


class Router:
    """`run` serves until `stop` is set. `epoch` identifies this run of the router."""

    def __init__(self, config: RouterProcessConfig, registry: CollectorRegistry) -> None:
        """Raises ModelError or ConfigError."""
        section = config.router
        policy = POLICIES.get(section.policy)
        if policy is None:
            raise ConfigError(f"router.policy: must be one of {', '.join(sorted(POLICIES))}")
        self.epoch = secrets.randbits(63)
        self._config = section
        self._registry = registry
        self.model: Model = load_model(config.model_dir, config.served_model_name)
        self.metrics = RouterMetrics(registry, SLO(section.slo.ttft_ms, section.slo.tpot_ms))
        changes = Changes()
        settings = Settings(
            epoch=self.epoch,
            rpc_timeout_s=section.rpc_timeout_s,
            reconnect_s=section.reconnect_s,
            max_reconnect_s=section.max_reconnect_s,
            on_change=changes.notify,
            on_dropped_event=self.metrics.dropped_events.inc,
        )
        self.fleet = Fleet(config.controller_address, settings, changes)
        self.pipeline = Pipeline(
            self.fleet,
            policy,
            Admission(section.max_inflight_requests, section.max_queued_requests),
            self.metrics,
            epoch=self.epoch,
            decode=None if self.model.tokenizer is None else self.model.tokenizer.decode,
            max_buffered_tokens=section.max_buffered_tokens,
            first_turn=secrets.randbelow(1 << 16),
        )
        self.metrics.watch(lambda: self.pipeline.num_inflight, lambda: self.pipeline.num_queued, self.fleet.num_workers)

    async def run(self, stop: asyncio.Event, announce: Callable[[str, str], None]) -> None:
        """`announce(address, metrics_address)` is called once the ports are open. Raises StartupError."""
        health = grpc_health.aio.HealthServicer()
        servicer = InferenceServicer(self.model, self._config, self.fleet, self.pipeline)
        server = self._server(servicer, health)
        metrics_server = self._serve_metrics()
        try:
            address = _bind(server, self._config)
            await server.start()
            announce(address, metrics_server.address)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.fleet.run()), group.create_task(self._report_health(health))]
                await stop.wait()
                await health.enter_graceful_shutdown()
                await self.pipeline.drain(self._config.drain_grace_s)
                await server.stop(STOP_GRACE_S)
                await self.pipeline.close()
                for task in tasks:
                    task.cancel()
        finally:
            await server.stop(None)
            servicer.close()
            metrics_server.close()

    def _server(self, servicer: InferenceServicer, health: grpc_health.aio.HealthServicer) -> grpc.aio.Server:
        config = self._config
        options = (
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        )
        server = grpc.aio.server(
            interceptors=[StatusInterceptor(self._count_error)],
            options=options,
            maximum_concurrent_rpcs=config.max_inflight_requests + config.max_queued_requests + NUM_SPARE_CALLS,
        )
        rpc.add_InferenceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        if config.reflection:
            names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _count_error(self, method: str, status: str) -> None:
        if method == GENERATE:
            self.metrics.failed(status)

    def _serve_metrics(self) -> MetricsServer:
        try:
            return MetricsServer(self._config.host, self._config.metrics_port, self._registry)
        except OSError as error:
            raise StartupError(f"router.metrics_port: {error.strerror}") from error

    async def _report_health(self, health: grpc_health.aio.HealthServicer) -> None:
        while True:
            change = self.fleet.changes.next()
            serving = self.fleet.can_serve()
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in ("", SERVICE):
                await health.set(name, status)
            await change.wait()


def _bind(server: grpc.aio.Server, config: RouterConfig) -> str:
    """Tries the address by itself first: the library's own failure says less, and says it on stderr."""
    try:
        with socket.create_server((config.host, config.port)):
            pass
        port = server.add_insecure_port(f"{config.host}:{config.port}")
    except (OSError, RuntimeError) as error:
        raise StartupError(f"router.port: cannot listen on {config.host}:{config.port}: {error}") from error
    return f"{config.host}:{port}"
