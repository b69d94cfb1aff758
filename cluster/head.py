"""The head process: holds one cluster together on the machine that launched it.

    python -m pdserve.cluster.head STATE_DIR/CONFIG.json STATUS_FD

    lock -> Ray (private or joined) -> controller actor -> workers -> router -> "ready" -> wait -> everything down

It owns what must go away with the cluster: the private Ray (which dies with it, however it dies) and the router process
(which ends when its stdin closes). Requests do not pass through it. Progress is written to STATUS_FD as JSON lines:
{"progress": …}, then {"ready": …} or {"error": …, "exit_code": …}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.exceptions import RayError

from pdserve.cluster import state
from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.controller import Controller
from pdserve.cluster.placement import WorkerPlan, plan_workers
from pdserve.cluster.worker_spec import Failure
from pdserve.proto.errors import ConfigError, PdserveError, StartupError
from pdserve.proto.types import Role

logger = logging.getLogger(__name__)
ROUTER_START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # from the first moment on: ending is in order
    draft, status_fd = Path(sys.argv[1]), int(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with os.fdopen(status_fd, "w", buffering=1) as status:
        try:
            config = ClusterConfig.model_validate_json(draft.read_text())
            with _lock(config.name), _ray_session(config, status) as private_ray:
                asyncio.run(_serve(config, private_ray, status))
        except PdserveError as error:
            logger.error("%s", error.message)
            if not status.closed:
                with suppress(PdserveError):  # nobody is left to be told; the log has it
                    _tell(status, error=error.message, exit_code=2 if isinstance(error, StartupError) else 1)
            sys.exit(1)
        except KeyboardInterrupt:
            logger.info("stopped while starting")
            sys.exit(1)
        finally:
            draft.unlink(missing_ok=True)


async def _serve(config: ClusterConfig, private_ray: bool, status: TextIO) -> None:
    """Start everything, say ready, wait for a signal, stop everything."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in END_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    namespace = f"pdserve-{config.name}"
    plans = _plan(config)
    if state.was_left(config.name):
        _kill_orphans(namespace)
    controller = _create_controller(config, plans, namespace, private_ray)
    router: asyncio.subprocess.Process | None = None
    try:
        address, metrics = await controller.serve.remote()
        _tell(status, progress="starting workers")
        launch = asyncio.ensure_future(controller.launch.remote())
        if await _first(launch, stop):
            return
        failure = launch.result()
        if isinstance(failure, Failure):
            raise StartupError(failure.message)
        _tell(status, progress="starting router")
        router, ready = await _start_router(config, address)
        await _serving(ready["address"])
        started = state.process_started(os.getpid())
        assert started is not None
        cluster = state.ClusterState(
            name=config.name,
            endpoint=ready["address"],
            metrics_endpoints={"router": ready["metrics_address"], "controller": metrics},
            controller=address,
            model=config.served_model_name or config.model,
            head_pid=os.getpid(),
            head_started=started,
            stop_timeout_s=router_stop_s(config) + 2 * STOP_TIMEOUT_S,
        )
        state.write(cluster)
        _tell(status, ready=asdict(cluster))
        status.close()
        exited = asyncio.ensure_future(router.wait())
        if not await _first(exited, stop):
            raise PdserveError(f"the router exited with status {exited.result()}")
    except RayError as error:
        raise StartupError(f"the controller failed: {' '.join(str(error).split())[:300]}") from error
    finally:
        for number in END_SIGNALS:
            loop.remove_signal_handler(number)
        _end_undisturbed()
        state.forget(config.name)
        await _stop_router(router, router_stop_s(config))
        await _stop_controller(controller)
        _kill_orphans(namespace)


def _end_undisturbed() -> None:
    """From here on everything is taken down, and another signal should not cut that short. Whoever waits kills what
    hangs, and sweeps up: Ray's shutdown brings the default handler back."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def router_stop_s(config: ClusterConfig) -> float:
    """How long the router may take: it lets requests finish first."""
    return config.router.drain_grace_s + 5.0


async def _first(work: asyncio.Future[Any], stop: asyncio.Event) -> bool:
    """Wait for either; whether it was the signal."""
    signalled = asyncio.ensure_future(stop.wait())
    await asyncio.wait({work, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if not work.done():
        work.cancel()
    return stop.is_set()


def _plan(config: ClusterConfig) -> list[WorkerPlan]:
    replicas = {role: config.replicas(role) for role in Role}
    cores = {role: config.pool(role).cores for role in Role}
    return plan_workers(replicas, cores, tuple(sorted(os.sched_getaffinity(0))))


def _create_controller(config: ClusterConfig, plans: list[WorkerPlan], namespace: str, private_ray: bool) -> Any:
    actor = ray.remote(Controller).options(
        name=f"{config.name}-controller",
        namespace=namespace,
        lifetime="detached",
        num_cpus=0,
        max_restarts=0,
        max_concurrency=64,
    )
    try:
        return actor.remote(config, plans, namespace, private_ray, state.state_dir(config.name))
    except ValueError as error:
        raise ConfigError(f"name: a cluster named {config.name!r} already runs on this Ray") from error


async def _stop_controller(controller: Any) -> None:
    try:
        await asyncio.wait_for(controller.stop.remote(), STOP_TIMEOUT_S)
    except (TimeoutError, RayError) as error:
        logger.warning("controller did not stop by itself: %s", type(error).__name__)
    finally:
        ray.kill(controller)


def _kill_orphans(namespace: str) -> None:
    """Actors that outlived their controller or their head, as they are meant to, but not their cluster."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace:
            logger.warning("killing %s, which was left", actor["name"])
            with suppress(ValueError):  # it has gone meanwhile
                ray.kill(ray.get_actor(actor["name"], namespace))


async def _start_router(config: ClusterConfig, controller: str) -> tuple[asyncio.subprocess.Process, dict[str, str]]:
    """Start the router process and wait for its one line; it ends when our end of its stdin closes."""
    process = {
        "controller_address": controller,
        "model_dir": config.model,
        "served_model_name": config.served_model_name or Path(config.model).name,
        "router": config.router.model_dump(),
    }
    path = state.state_dir(config.name) / "router.json"
    path.write_text(json.dumps(process))
    command = (sys.executable, "-m", "pdserve.router", str(path), "--exit-with-parent")
    pipe = asyncio.subprocess.PIPE
    router = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert router.stdout is not None
    try:
        line = await asyncio.wait_for(router.stdout.readline(), ROUTER_START_TIMEOUT_S)
    except TimeoutError as error:
        router.kill()
        raise StartupError(f"router: not ready after {ROUTER_START_TIMEOUT_S:.0f} s") from error
    if not line:
        code = await router.wait()
        raise StartupError(f"router: exited with status {code}; see {state.state_dir(config.name) / 'head.log'}")
    ready: dict[str, str] = json.loads(line)
    return router, ready


async def _serving(endpoint: str) -> None:
    """Wait until the router has met its workers: a cluster that says ready answers its first request."""
    try:
        async with asyncio.timeout(ROUTER_START_TIMEOUT_S), grpc.aio.insecure_channel(endpoint) as channel:
            async for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
    except TimeoutError:
        pass
    except grpc.aio.AioRpcError as error:
        raise StartupError(f"router: does not answer ({error.code().name})") from error
    raise StartupError(
        f"router: no prefill and decode worker that fit each other within {ROUTER_START_TIMEOUT_S:.0f} s"
    )


async def _stop_router(router: asyncio.subprocess.Process | None, timeout_s: float) -> None:
    if router is None or router.returncode is not None:
        return
    router.terminate()
    try:
        await asyncio.wait_for(router.wait(), timeout_s)
    except TimeoutError:
        router.kill()
        await router.wait()


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """Held for the life of the cluster."""
    with state.lock(name) as is_ours:
        if not is_ours:
            raise ConfigError(f"name: a cluster named {name!r} is already running; `pdserve down --name {name}`")
        yield


@contextmanager
def _ray_session(config: ClusterConfig, status: TextIO) -> Iterator[bool]:
    """A private Ray that dies with this process, or a joined one; whether it is private."""
    private = config.ray.address is None
    _tell(status, progress="starting Ray" if private else "joining Ray")
    options: dict[str, Any] = {"address": config.ray.address}
    with _ray_folder(config.name) as folder:
        if private:
            options = {
                "num_cpus": os.cpu_count(),
                "include_dashboard": False,
                "object_store_memory": config.ray.object_store_memory_bytes,
                "_temp_dir": str(folder),
            }
        try:
            _init_ray(config, options)
            # Ray installs a handler of its own, which exits without unwinding.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            yield private
        finally:
            _end_undisturbed()
            ray.shutdown()


def _init_ray(config: ClusterConfig, options: dict[str, Any]) -> None:
    """Raises StartupError."""
    try:
        ray.init(namespace=f"pdserve-{config.name}", log_to_driver=False, configure_logging=False, **options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise StartupError(f"ray: cannot {'join' if config.ray.address else 'start'}: {why}") from error


@contextmanager
def _ray_folder(name: str) -> Iterator[Path]:
    """A short path for Ray's sockets and logs, removed at the end; so is one that a killed head has left."""
    state.remove_ray_folder(name)
    note, folder = state.ray_folder_note(name), Path(tempfile.mkdtemp(prefix="pdserve-"))
    try:
        note.write_text(str(folder))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        note.unlink(missing_ok=True)


def _tell(status: TextIO, **message: object) -> None:
    """One JSON line to whoever launched us.

    Raises:
        StartupError: it is gone, so nobody wants the cluster.
    """
    try:
        status.write(json.dumps(message) + "\n")
        status.flush()
    except BrokenPipeError as error:
        raise StartupError("whoever started this is gone") from error


if __name__ == "__main__":
    main()
