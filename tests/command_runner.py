"""The verbs that talk to a router, run in this process as a user would, against the scripted server."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from fake_inference import FakeInference
from typer.testing import CliRunner, Result

from pdserve.cluster.bench_command import bench
from pdserve.cluster.chat_command import chat
from pdserve.cluster.errors_seam import one_line_errors
from pdserve.cluster.generate_command import generate


def application(*commands: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    for command in commands:
        app.command()(one_line_errors(command))
    return app


APP = application(generate, chat, bench)


def invoke(fake: FakeInference | None, *args: str, stdin: str | bytes = "") -> Result:
    where = ["--endpoint", fake.endpoint] if fake else []
    return CliRunner().invoke(APP, [args[0], *where, *args[1:]], input=stdin)


def batch(fake: FakeInference, folder: Path, *args: str, lines: str) -> Result:
    path = folder / "prompts.jsonl"
    path.write_bytes(lines.encode())
    return invoke(fake, "generate", "--prompts", str(path), *args)


def lines_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
