"""Where a running cluster is written down, so that a later command finds it.

One folder a cluster, `${XDG_STATE_HOME:-~/.local/state}/pdserve/<name>/`, readable by its owner alone:
`cluster.json` (who and where), `config.json` (what was asked for), `head.log`. Knows nothing of Ray or gRPC; a
file that names a process which is gone counts as no cluster.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pdserve.proto.errors import ConfigError

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True, slots=True)
class ClusterState:
    """A cluster that is up. `head_started` tells this head process from another one with the same pid."""

    name: str
    endpoint: str
    metrics_endpoints: dict[str, str]
    controller: str
    model: str
    head_pid: int
    head_started: float
    stop_timeout_s: float = 60.0


def state_root() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "pdserve"


def state_dir(name: str) -> Path:
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"name: {name!r} is not a cluster name (lower-case letters, digits, '-', at most 40)")
    return state_root() / name


def prepare(name: str) -> Path:
    """The cluster's folder, made for its owner alone."""
    folder = state_dir(name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def process_started(pid: int) -> float | None:
    """Start time of a process in clock ticks since boot, or `None` when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else float(fields[19])


def write(state: ClusterState) -> None:
    path = state_dir(state.name) / "cluster.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(state), indent=1))
    draft.replace(path)


def read(name: str) -> ClusterState | None:
    """The cluster of that name if its head is alive."""
    try:
        state = ClusterState(**json.loads((state_dir(name) / "cluster.json").read_text()))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{state_dir(name) / 'cluster.json'} is damaged; remove it ({error})") from error
    return state if process_started(state.head_pid) == state.head_started else None


def was_left(name: str) -> bool:
    """Whether a head died without cleaning up."""
    return (state_dir(name) / "cluster.json").exists() and read(name) is None


def forget(name: str) -> None:
    (state_dir(name) / "cluster.json").unlink(missing_ok=True)


def ray_folder_note(name: str) -> Path:
    """Where the head of that name writes down which folder its Ray has."""
    return state_dir(name) / "ray-folder"


@contextmanager
def lock(name: str) -> Iterator[bool]:
    """Whether nobody else has it. A head holds it for its life, by the kernel: a killed one leaves no stale lock."""
    with (state_dir(name) / "head.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def sweep(name: str) -> None:
    """What a head that was killed could not take away itself; nothing while another one of that name lives."""
    if not state_dir(name).is_dir():
        return
    with lock(name) as is_ours:
        if is_ours:
            remove_ray_folder(name)


def remove_ray_folder(name: str) -> None:
    """Of a head that is gone, by the note that it has left."""
    note = ray_folder_note(name)
    with suppress(FileNotFoundError):
        shutil.rmtree(note.read_text(), ignore_errors=True)
        note.unlink()


def remove(name: str) -> None:
    """The folder of a cluster that is down, with its log. What cannot be removed is left."""
    sweep(name)
    shutil.rmtree(state_dir(name), ignore_errors=True)


def names() -> list[str]:
    """Clusters that are up, by name."""
    root = state_root()
    found = sorted(path.parent.name for path in root.glob("*/cluster.json")) if root.is_dir() else []
    return [name for name in found if read(name) is not None]


def already_running(name: str) -> str:
    return f"name: a cluster named {name!r} is already running; stop it with: pdserve down --name {name}"


def require(name: str) -> ClusterState:
    state = read(name)
    if state is None:
        others = ", ".join(names())
        hint = f" (running: {others})" if others else "; start one with: pdserve up"
        raise ConfigError(f"no cluster named {name!r} is running{hint}")
    return state


def resolve_endpoint(endpoint: str | None, name: str) -> str:
    """`host:port` of the router: the one given, else that of the running cluster `name`."""
    return endpoint if endpoint else require(name).endpoint
