"""The Ray surface of a worker: a process that Ray places, starts and watches.

Three calls in a worker's life, `start`, `run`, `stop`; no request, token or KV byte passes through them. The work is
done by `Worker`, which knows nothing of Ray and is imported only in the worker's own process: this module is also
imported by the controller, which needs the class and must not carry torch.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pdserve.cluster.worker_spec import Failure, WorkerSpec
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import WorkerInfo

logger = logging.getLogger(__name__)


class WorkerActor:
    """One worker process; made an actor by the controller."""

    def __init__(self, spec: WorkerSpec) -> None:
        log_to(Path(spec.log_path))
        self._spec = spec
        self._worker: Any = None

    async def start(self) -> WorkerInfo | Failure:
        """Pin the process, load the model, serve; how to reach it."""
        pin(self._spec.cores)
        try:
            self._worker = await asyncio.to_thread(load, self._spec)
            info: WorkerInfo = await self._worker.serve()
            return info
        except PdserveError as error:
            logger.exception("cannot start")
            return Failure(type(error).__name__, error.message)
        except Exception as error:
            logger.exception("cannot start")
            return Failure("InternalError", f"{type(error).__name__} while starting; see {self._spec.log_path}")

    async def run(self) -> str:
        """Wait until the worker ends; why it did."""
        detail: str = await self._worker.ended()
        return detail

    async def stop(self) -> None:
        if self._worker is not None:
            await self._worker.stop()


def load(spec: WorkerSpec) -> Any:
    """Import torch and all that, then load the model. Blocking."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(spec.cores))
    return importlib.import_module("pdserve.cluster.worker").Worker.load(spec)


def pin(cores: tuple[int, ...]) -> None:
    """Bind every thread of this process, and those to come, to `cores`."""
    for task in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # a thread that has ended meanwhile
            os.sched_setaffinity(int(task), cores)


def log_to(path: Path) -> None:
    """This process's log: a file of its own beside the cluster's state, or standard error on another machine."""
    handler = logging.FileHandler(path, mode="w") if path.parent.is_dir() else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
