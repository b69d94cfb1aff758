"""Start and stop a cluster from the command line's side: spawn the head process, follow it, end it.

Imports neither ray nor torch, so that the command line answers at once; the head process does the work.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pdserve.cluster import state
from pdserve.cluster.config import ClusterConfig
from pdserve.proto.errors import ConfigError, ModelError, PdserveError, StartupError

STOP_TIMEOUT_S = 60.0
POLL_S = 1.0


@contextmanager
def launched(
    config: ClusterConfig, progress: Callable[[str], None]
) -> Iterator[tuple[state.ClusterState, subprocess.Popen[bytes]]]:
    """A cluster that serves, and its head process. An exception in the block, Ctrl-C included, takes it down again.

    Raises:
        ConfigError: a cluster of that name runs already.
        ModelError, StartupError: with the one line that says why it could not start.
    """
    if state.read(config.name) is not None:
        raise ConfigError(state.already_running(config.name))
    check_model_dir(Path(config.model))
    if config.ray.address is None:  # or it is another machine that listens
        check_host(config.kv_transfer.host)
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd) as lines:
        head = _spawn_head(config, write_fd)
        stop_timeout_s = STOP_TIMEOUT_S
        try:
            cluster = _follow(lines, state.state_dir(config.name), progress)
            stop_timeout_s = cluster.stop_timeout_s
            yield cluster, head
        except BaseException:
            if not stop_process(head.pid, stop_timeout_s):
                raise PdserveError(f"head process {head.pid} does not end") from None
            state.sweep(config.name)
            raise


def _spawn_head(config: ClusterConfig, write_fd: int) -> subprocess.Popen[bytes]:
    """Start the head process; it writes its progress to `write_fd`, which is closed here."""
    folder = state.prepare(config.name)
    draft = folder / f"config-{os.getpid()}.json"
    draft.write_text(config.model_dump_json(indent=1))
    try:
        with (folder / "head.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pdserve.cluster.head", str(draft), str(write_fd)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(write_fd,),
                env=head_environment(config),
                start_new_session=True,
            )
    finally:
        os.close(write_fd)


def head_environment(config: ClusterConfig) -> dict[str, str]:
    """The head's environment. Ray reads its settings when it is imported, so they are set before.

    A private Ray has a token that never leaves its process tree, and tells nobody of its use. Set explicitly: Ray's
    defaults flip between versions. A joined Ray's settings are the operator's.
    """
    environment = dict(os.environ)
    if config.ray.address is None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
        environment |= {"RAY_worker_niceness": "0"}  # Ray's default of 15 lets any other process starve a worker
    return environment | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "HF_HUB_OFFLINE": "1"}


def _follow(lines: Iterable[str], folder: Path, progress: Callable[[str], None]) -> state.ClusterState:
    for line in lines:
        message = json.loads(line)
        if "ready" in message:
            return state.ClusterState(**message["ready"])
        if "error" in message:
            kind = StartupError if message.get("exit_code") == 2 else PdserveError
            raise kind(message["error"])
        progress(message["progress"])
    raise StartupError(f"the head process ended without a word; see {folder / 'head.log'}")


def stop(name: str) -> None:
    """Stop the cluster of that name and wait until it is gone.

    Raises:
        ConfigError: no such cluster.
        StartupError: it is still there after every means.
    """
    cluster = state.require(name)
    if not stop_process(cluster.head_pid, cluster.stop_timeout_s):
        raise StartupError(f"head process {cluster.head_pid} does not end; see {state.state_dir(name) / 'head.log'}")
    state.forget(name)
    state.sweep(name)


def stop_process(pid: int, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """SIGTERM, wait, SIGKILL; whether the process is gone. Its private Ray and its router end with it."""
    for number, limit_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return True
        if _gone(pid, limit_s):
            return True
    return False


def _gone(pid: int, timeout_s: float) -> bool:
    """Wait for the end of a process that need not be our child."""
    deadline = time.monotonic() + timeout_s
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        while time.monotonic() < deadline:
            if state.process_started(pid) is None:
                return True
            _wait_readable(handle, min(POLL_S, deadline - time.monotonic()))
        return state.process_started(pid) is None
    finally:
        os.close(handle)


def _wait_readable(handle: int, timeout_s: float) -> None:
    """A pidfd becomes readable when its process ends."""
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    poller.poll(max(0.0, timeout_s) * 1e3)


def check_model_dir(path: Path) -> None:
    """What can be seen without loading, so that the common mistakes are answered at once.

    Raises:
        ModelError: naming the directory or the file.
    """
    if not path.exists():
        raise ModelError(f"model: {path}: no such directory")
    if not path.is_dir():
        raise ModelError(f"model: {path}: not a directory")
    if not (path / "config.json").is_file():
        raise ModelError(f"model: {path}: no config.json; a Hugging Face model folder is needed")
    if not any(path.glob("*.safetensors")):
        pickles = [entry.name for suffix in ("*.bin", "*.pt", "*.pth") for entry in path.glob(suffix)]
        why = f"only pickle weights ({pickles[0]}), which can run code; convert them" if pickles else "no weights"
        raise ModelError(f"model: {path}: {why}; *.safetensors are needed")


def check_host(host: str) -> None:
    """Raises ConfigError if nothing on this machine can listen there."""
    try:
        socket.create_server((host, 0)).close()
    except OSError as error:
        raise ConfigError(f"kv_transfer.host: nothing can listen on {host!r} here ({error.strerror})") from error
