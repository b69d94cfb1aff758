"""The router as an operating system process: start, one line, stop, and the ways it refuses to start."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from pdserve.proto.errors import ConfigError, StartupError
from pdserve.router.app import Router
from pdserve.router.config import RouterProcessConfig
from pdserve.router.fleet import Fleet
from pdserve.router.main import load_config, main

COMMAND = [sys.executable, "-m", "pdserve.router"]


def write_config(path: Path, **settings: Any) -> Path:
    config = {"controller_address": "127.0.0.1:1", **settings}
    path.write_text(json.dumps(config))
    return path


def test_importing_the_router_brings_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, pdserve.router.main; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'ray', 'transformers', 'numpy') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def process(bare_model_dir: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    config = write_config(tmp_path / "router.json", model_dir=str(bare_model_dir))
    with subprocess.Popen(
        [*COMMAND, str(config), "--exit-with-parent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_one_json_line_says_where_it_serves(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = json.loads(process.stdout.readline())
    assert set(line) == {"address", "metrics_address"}
    with grpc.insecure_channel(line["address"]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stdout.read() == ""


def test_it_ends_with_its_parent(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(20) == 0


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"router": {"policy": "magic"}}, "router.policy"),
    ({"router": {"max_inflight_requests": 0}}, "router.max_inflight_requests"),
    ({"router": {"slo": {"ttft_ms": -1}}}, "router.slo.ttft_ms"),
    ({"router": {"no_such_key": 1}}, "router.no_such_key"),
    ({"router": {"default_timeout_s": 10, "max_timeout_s": 1}}, "default_timeout_s"),
    ({"no_such_key": 1}, "no_such_key"),
    ({"model_dir": "/nowhere"}, "model_dir"),
    ({"model_dir": 7}, "model_dir"),
]


@pytest.mark.parametrize(("changes", "key"), BAD_CONFIGS)
def test_a_bad_setting_is_named_in_one_line(
    bare_model_dir: Path, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    path = write_config(tmp_path / "router.json", **{"model_dir": str(bare_model_dir), **changes})
    with pytest.raises(StartupError) as raised:
        Router(load_config(path), CollectorRegistry())
    assert key in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b" " * (1 << 21)])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "router.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("key", ["port", "metrics_port"])
def test_a_taken_port_prevents_the_start(
    bare_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write_config(tmp_path / "router.json", model_dir=str(bare_model_dir), router={key: port})
        assert main([str(config)]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert f"router.{key}" in said.err


def test_a_bug_in_a_task_ends_it_with_one_line_and_status_1(
    bare_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explode(self: Fleet) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(Fleet, "run", explode)
    assert main([str(write_config(tmp_path / "router.json", model_dir=str(bare_model_dir)))]) == 1
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 1
    assert "RuntimeError: two lines (test_router_main.py:" in said.err


def test_the_configuration_is_frozen() -> None:
    config = RouterProcessConfig(controller_address="x", model_dir="y")
    with pytest.raises(ValueError, match="frozen"):
        config.model_dir = "z"
