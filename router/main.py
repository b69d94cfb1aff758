"""The router's process: `python -m pdserve.router CONFIG.json [--exit-with-parent]`.

One JSON line on stdout when it serves: {"address": "host:port", "metrics_address": "host:port"}. SIGTERM or SIGINT,
or with `--exit-with-parent` the end of stdin, ends it in order with exit status 0. What prevents the start is one line
on stderr and exit status 2; a bug that ends it later is one line and exit status 1. Imports neither torch nor ray nor
transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from pdserve.proto.errors import ConfigError, StartupError
from pdserve.router.app import Router
from pdserve.router.config import RouterProcessConfig

MAX_CONFIG_BYTES = 1 << 20


def load_config(path: Path) -> RouterProcessConfig:
    """Raises ConfigError naming the key."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path.name}: larger than {MAX_CONFIG_BYTES} bytes")
        return RouterProcessConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path.name}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or path.name
        raise ConfigError(f"{key}: {first['msg']}") from error


async def serve(config: RouterProcessConfig, exit_with_parent: bool) -> None:
    """Until told to stop. Raises StartupError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if exit_with_parent:
        watcher = threading.Thread(target=_await_stdin_end, args=(loop, stop), name="parent", daemon=True)
        watcher.start()
    await Router(config, CollectorRegistry()).run(stop, _announce)


def _announce(address: str, metrics_address: str) -> None:
    print(json.dumps({"address": address, "metrics_address": metrics_address}), flush=True)


def _await_stdin_end(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """A thread, because a pipe, a terminal and /dev/null can all be read but not all be polled."""
    while os.read(0, 4096):
        continue
    if not loop.is_closed():
        loop.call_soon_threadsafe(stop.set)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdserve.router", description="The router of a pdserve cluster.")
    parser.add_argument("config", type=Path, help="JSON file: controller_address, model_dir, router")
    parser.add_argument("--exit-with-parent", action="store_true", help="stop when stdin ends")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        uvloop.run(serve(load_config(arguments.config), arguments.exit_with_parent))
    except StartupError as error:
        print(f"pdserve router: {error.message}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"pdserve router: ended by a bug: {_told_in_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _told_in_one_line(error: BaseException) -> str:
    """The first cause of a group, and where it was raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
