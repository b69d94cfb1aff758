"""The Ray surface of a worker: a process that Ray places, starts and watches.

Three calls in a worker's life, `start`, `run`, `stop`; no request, token or KV byte passes through them. The work is done
by `Worker`, which knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from pdserve.cluster.worker import Worker, WorkerSpec
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import WorkerInfo

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    WorkerActor: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """A start-up error as a value: exceptions lose their class on the way through Ray."""

    kind: str
    message: str


@ray.remote
class WorkerActor:  # type: ignore[no-redef]
    """One worker process."""

    def __init__(self, spec: WorkerSpec) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._spec = spec
        self._worker: Worker | None = None

    async def start(self) -> WorkerInfo | Failure:
        """Pin the process, load the model, serve; how to reach it."""
        pin(self._spec.cores)
        try:
            self._worker = await asyncio.to_thread(Worker.load, self._spec)
            return await self._worker.serve()
        except PdserveError as error:
            logger.exception("cannot start")
            return Failure(type(error).__name__, error.message)

    async def run(self) -> str:
        """Wait until the worker ends; why it did."""
        assert self._worker is not None
        return await self._worker.ended()

    async def stop(self) -> None:
        if self._worker is not None:
            await self._worker.stop()


def pin(cores: tuple[int, ...]) -> None:
    """Bind every thread of this process, and those to come, to `cores`, and give torch as many threads."""
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), cores)
    torch.set_num_threads(len(cores))
