"""What a worker is started from, and what it answers when it cannot start. Travels through Ray.

Imports nothing heavy: the controller needs these, torch it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.engine.config import EngineConfig
from pdserve.kv_transfer.config import KVTransferConfig
from pdserve.proto.types import Role


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker. `cores` are the CPUs it is pinned to; `host` is the interface its servers listen on.

    `controller` is the address of the fleet's keeper. `log_path` is where the worker logs, if that folder exists on its
    machine; else it logs to its standard error.
    """

    worker_id: str
    role: Role
    model: str
    engine: EngineConfig
    kv_transfer: KVTransferConfig
    cores: tuple[int, ...]
    host: str
    log_path: str
    controller: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A start-up error as a value: exceptions lose their class on the way through Ray."""

    kind: str
    message: str
