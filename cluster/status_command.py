"""`pdserve status`: what every worker is doing, once, as JSON, or as a table that keeps itself up to date.

Reads the state file, asks the controller for every worker's load and the router for its health. Judges nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pdserve.cluster import state
from pdserve.proto import worker_pb2 as pb
from pdserve.proto import worker_pb2_grpc as pb_grpc

TIMEOUT_S = 5.0
WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one moment. `controller` and `router` say "serving" or why not."""

    cluster: state.ClusterState
    controller: str
    router: str
    workers: tuple[pb.WorkerStatus, ...]
    links: tuple[pb.PairLink, ...]

    @property
    def healthy(self) -> bool:
        alive = all(worker.member.state == "ready" and worker.HasField("load") for worker in self.workers)
        alive = alive and all(link.kind for link in self.links)
        return alive and self.controller == self.router == "serving"


def status(
    name: Annotated[str, typer.Option(help="Cluster name.")] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    watch: Annotated[bool, typer.Option(help="Keep the table up to date until Ctrl-C.")] = False,
) -> None:
    """Show the workers of a running cluster. Exit status 1 when a part of it is not well."""
    cluster = state.require(name)
    if watch and not as_json:
        _watch(cluster)
        return
    snapshot = take(cluster)
    if as_json:
        typer.echo(json.dumps(to_json(snapshot), indent=1))
    else:
        Console().print(to_table(snapshot))
    raise typer.Exit(0 if snapshot.healthy else 1)


def take(cluster: state.ClusterState) -> Snapshot:
    """Ask everybody, each with a deadline."""
    controller, reply = "serving", pb.StatusResponse()
    try:
        with grpc.insecure_channel(cluster.controller) as channel:
            reply = pb_grpc.ControllerStub(channel).Status(pb.StatusRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        controller = f"not answering ({_code(error)})"
    return Snapshot(cluster, controller, _router_health(cluster.endpoint), tuple(reply.workers), tuple(reply.links))


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """Stable keys for scripts; block counts sum to `total`."""
    return {
        "name": snapshot.cluster.name,
        "model": snapshot.cluster.model,
        "endpoint": snapshot.cluster.endpoint,
        "metrics_endpoints": snapshot.cluster.metrics_endpoints,
        "healthy": snapshot.healthy,
        "router": snapshot.router,
        "controller": snapshot.controller,
        "workers": [_worker_json(worker) for worker in snapshot.workers],
        "links": [
            {"source": link.source, "target": link.target, "kind": link.kind, "reason": link.reason}
            for link in snapshot.links
        ],
    }


def _worker_json(worker: pb.WorkerStatus) -> dict[str, Any]:
    member, load = worker.member, worker.load
    row: dict[str, Any] = {
        "worker_id": member.info.worker.worker_id,
        "role": member.info.role,
        "state": member.state,
        "detail": member.detail,
        "address": member.info.worker.address,
        "metrics_address": member.info.metrics_address,
        "generation": str(member.info.worker.generation),
        "cores": list(member.info.cores),
        "pid": member.info.pid,
        "links": MessageToDict(member.info).get("linkAddress", {}),
        "load": None,
    }
    if worker.HasField("load"):
        row["load"] = {
            "num_waiting": load.num_waiting,
            "num_running": load.num_running,
            "queued_tokens": load.queued_tokens,
            "num_steps": load.num_steps,
            "num_preemptions": load.num_preemptions,
            "step_ms": round(load.step_s * 1e3, 3),
            "blocks": {
                "total": load.total_blocks,
                "free": load.free_blocks,
                "running": load.running_blocks,
                "leased": load.leased_blocks,
                "receiving": load.receiving_blocks,
                "quarantined": load.quarantined_blocks,
                "reserved": load.reserved_blocks,
            },
        }
    return row


def to_table(snapshot: Snapshot) -> Table:
    cluster, health = snapshot.cluster, f"router {snapshot.router}, controller {snapshot.controller}"
    table = Table(title=f"{cluster.name}  {cluster.endpoint}  {health}", title_justify="left")
    for column in ("worker", "role", "state", "cores", "running", "waiting", "step ms", "blocks free/total"):
        table.add_column(column)
    table.add_column("leased/receiving/quarantined")
    for worker in snapshot.workers:
        info, load = worker.member.info, worker.load
        state_text = (
            worker.member.state if not worker.member.detail else f"{worker.member.state}: {worker.member.detail}"
        )
        cells = ["-"] * 5
        if worker.HasField("load"):
            cells = [
                str(load.num_running),
                str(load.num_waiting),
                f"{load.step_s * 1e3:.1f}",
                f"{load.free_blocks}/{load.total_blocks}",
                f"{load.leased_blocks}/{load.receiving_blocks}/{load.quarantined_blocks}",
            ]
        table.add_row(info.worker.worker_id, info.role, state_text, ",".join(map(str, info.cores)), *cells)
    table.caption = "\n".join(map(_link_text, snapshot.links))
    table.caption_justify = "left"
    return table


def _link_text(link: pb.PairLink) -> str:
    """A slow path says why it is one."""
    how = f"over {link.kind}" if link.kind else "not possible"
    return f"KV {link.source} -> {link.target}: {how}" + (f" ({link.reason})" if link.reason else "")


def _watch(cluster: state.ClusterState) -> None:
    with Live(to_table(take(cluster)), console=Console(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(WATCH_S)
                live.update(to_table(take(cluster)), refresh=True)
        except KeyboardInterrupt:
            return


def _router_health(endpoint: str) -> str:
    try:
        with grpc.insecure_channel(endpoint) as channel:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return f"not answering ({_code(error)})"
    return "serving" if reply.status == health_pb2.HealthCheckResponse.SERVING else "not serving"


def _code(error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)
    return str(error.code().name)
