"""Start, question and stop real clusters from tests, only through what a user has: the command line and the client.

Knows nothing of what the tests assert.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pdserve.cluster.state import ClusterState
from pdserve.cluster.status_command import take, to_json

PDSERVE = (sys.executable, "-m", "pdserve.cluster.cli")
SETTLE_S = 10.0
COMMAND_TIMEOUT_S = 120.0
_numbers = count()


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster. `environment` is what commands about it need."""

    name: str
    endpoint: str
    environment: dict[str, str]

    def command(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run(self.environment, *arguments, **options)

    def status(self) -> dict[str, Any]:
        """What `pdserve status --json` prints, without the second that a new process takes."""
        path = Path(self.environment["XDG_STATE_HOME"]) / "pdserve" / self.name / "cluster.json"
        return to_json(take(ClusterState(**json.loads(path.read_text()))))

    def loads(self) -> dict[str, dict[str, Any]]:
        """Load of every live worker, by worker id."""
        return {worker["worker_id"]: worker["load"] for worker in self.status()["workers"] if worker["load"]}

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Status once `condition` holds; fails the test when it does not within `SETTLE_S`."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            status = self.status()
            if condition(status):
                return status
            assert time.monotonic() < deadline, f"not within {SETTLE_S} s: {what}\n{json.dumps(status, indent=1)}"

    def assert_drained(self) -> None:
        """Every block of every live worker is free again, and nothing is promised or queued."""
        self.wait_until(_is_drained, "every block of every worker free")


def _is_drained(status: dict[str, Any]) -> bool:
    loads = [worker["load"] for worker in status["workers"] if worker["load"]]
    idle = all(load["num_running"] == load["num_waiting"] == 0 for load in loads)
    free = all(load["blocks"]["free"] == load["blocks"]["total"] for load in loads)
    return bool(loads) and idle and free and all(load["blocks"]["reserved"] == 0 for load in loads)


def run(environment: dict[str, str], *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """One `pdserve` command, output captured, never waiting for ever."""
    options = {
        "capture_output": True,
        "text": True,
        "timeout": COMMAND_TIMEOUT_S,
        "stdin": subprocess.DEVNULL,
    } | options
    return subprocess.run([*PDSERVE, *arguments], env=environment, **options)


@contextmanager
def running(environment: dict[str, str], model: Path, *settings: str) -> Iterator[Cluster]:
    """A cluster for the time of a `with` block; whatever happens, it is down afterwards."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    chosen = [f"name={name}", f"model={model}", *settings]
    if "PDSERVE_TEST_RAY" in environment:
        chosen.append(f"ray.address={environment['PDSERVE_TEST_RAY']}")
    arguments = [part for setting in chosen for part in ("--set", setting)]
    started = run(environment, "up", *arguments, "--detach")
    assert started.returncode == 0, started.stderr
    try:
        yield Cluster(name, started.stdout.strip(), environment)
    finally:
        stopped = run(environment, "down", "--name", name)
        assert stopped.returncode == 0, stopped.stderr


def gather(work: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Run coroutines at once; results in order, exceptions as results."""

    async def everything() -> list[Any]:
        return await asyncio.gather(*(one() for one in work), return_exceptions=True)

    return asyncio.run(everything())
